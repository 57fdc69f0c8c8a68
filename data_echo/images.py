"""Decoding and resizing of single images before the echo; all are uint8 [height, width, 3]."""

from __future__ import annotations

import io

import numpy as np

from data_echo.errors import DataError

Image = np.ndarray

_SAME_COLOURS = ("YCbCr", "RGB", "Gray")  # PIL converts the others (CMYK) to RGB in its own way

try:
    import simplejpeg
except ImportError:  # the extra `fast-jpeg`: several times faster on small images, with the same pixels
    simplejpeg = None


def decode(data: bytes | memoryview) -> Image:
    """Decode an encoded image (JPEG, PNG, or any format that PIL reads) into RGB: uint8 [height, width, 3].

    Raises:
        DataError: the bytes are not a whole image.
    """
    if simplejpeg is not None and simplejpeg.is_jpeg(data):
        try:
            if simplejpeg.decode_jpeg_header(data)[2] in _SAME_COLOURS:
                return simplejpeg.decode_jpeg(data, "RGB")
        except ValueError:
            pass  # damaged: PIL decides, as it does without simplejpeg
    return _decode_with_pil(data)


def resize(image: Image, height: int, width: int) -> Image:
    """Resize an image, bilinear with antialiasing: uint8 [height, width, 3]."""
    from PIL import Image as Pil

    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Pil.fromarray(image).resize((width, height), Pil.Resampling.BILINEAR))


def _decode_with_pil(data: bytes | memoryview) -> Image:
    from PIL import Image as Pil

    try:
        return np.asarray(Pil.open(io.BytesIO(data)).convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        # PIL's text for an unknown format holds a memory address, which differs from one reading to the next.
        why = "no image" if isinstance(error, Pil.UnidentifiedImageError) else str(error)
        raise DataError(
            f"image: {len(data)} bytes cannot be decoded ({why})", "a whole JPEG or PNG"
        ) from None
