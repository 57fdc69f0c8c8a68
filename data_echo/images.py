"""Decoding and resizing of single images before the echo; all are uint8 [height, width, 3].

Every picture becomes 8-bit RGB as Pillow's `convert("RGB")` makes it, and as it is meant to be seen:

* The EXIF orientation is applied.
* Alpha is dropped: the colours are those that are stored, under transparent pixels, too. ICC profiles are not
  applied.
* Of 16-bit grey the high byte is taken, as Pillow does with 16-bit colour. Integers of 32 bits and floating
  point, whose black and white no file tells, are refused.
* Of an animation or a stack of pages the first picture is taken.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from data_echo.errors import DataError

Image = np.ndarray

_SAME_COLOURS = ("YCbCr", "RGB", "Gray")  # PIL converts the others (CMYK) to RGB in its own way

try:
    import simplejpeg
except ImportError:  # the extra `fast-jpeg`: several times faster on small images, with the same pixels
    simplejpeg = None


_ENCODED = (bytes, bytearray, memoryview)
_EXIF, _IN_XMP = b"Exif\0\0", b"tiff:Orientation"  # one of them is in every JPEG with an orientation
_ORIENTATION = 274  # EXIF's number of the tag
_TURNS = {
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: image[::-1, ::-1].swapaxes(0, 1),
    8: lambda image: np.rot90(image),
}
_MOST_PIXELS = 178_956_970  # Pillow's bound, against files of a few bytes that fill the memory
_FULL_RANGE = ("PNG", "JPEG2000")  # formats whose 16-bit grey reaches from 0 to 65535
_BITS, _PHOTOMETRIC, _BLACK_IS_ZERO = 258, 262, 1  # TIFF's numbers


def decode(data: bytes | memoryview) -> Image:
    """Decode an encoded image (JPEG, PNG, or any format that PIL reads) into RGB: uint8 [height, width, 3].

    Raises:
        DataError: the bytes are not a whole image, it has too many pixels, or its range is not known.
    """
    if not isinstance(data, _ENCODED):
        raise DataError(f"image: a {type(data).__name__}", "the bytes of a JPEG or PNG")
    if simplejpeg is not None and simplejpeg.is_jpeg(data):
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
            if colours in _SAME_COLOURS and height * width <= _MOST_PIXELS:
                image = simplejpeg.decode_jpeg(data, "RGB")
                encoded = bytes(data)
                return _turned(image, encoded) if _EXIF in encoded or _IN_XMP in encoded else image
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
        with Pil.open(io.BytesIO(data)) as image:
            if image.width * image.height > _MOST_PIXELS:
                raise DataError(f"image: {image.width} × {image.height}", f"at most {_MOST_PIXELS:,} pixels")
            image.load()
            return _upright(_eight_bits(image), image)
    except DataError:
        raise
    except Exception as error:  # its plugins raise whatever damaged bytes lead to
        # PIL's text for an unknown format holds a memory address, which differs from one reading to the next.
        why = "no image" if isinstance(error, Pil.UnidentifiedImageError) else str(error)
        raise DataError(
            f"image: {len(data)} bytes cannot be decoded ({why})", "a whole JPEG or PNG"
        ) from None


def _eight_bits(image: Any) -> Image:
    """A decoded PIL image as RGB."""
    if image.mode.startswith("I;16") and _has_full_range(image):
        return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode.startswith("I") or image.mode == "F":
        raise DataError(
            f"image: {image.format} of mode {image.mode}, whose black and white are not known",
            "8 bits, or PNG of 16 bits",
        )
    if image.mode == "La" or (image.mode == "P" and "transparency" in image.info):
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    return np.asarray(image.convert("RGB"))


def _has_full_range(image: Any) -> bool:
    if image.format == "TIFF":
        return image.tag_v2.get(_BITS) == (16,) and image.tag_v2.get(_PHOTOMETRIC) == _BLACK_IS_ZERO
    return image.format in _FULL_RANGE


def _turned(pixels: Image, encoded: bytes) -> Image:
    """Decoded pixels, turned as the file's metadata say."""
    from PIL import Image as Pil

    with Pil.open(io.BytesIO(encoded)) as image:
        return _upright(pixels, image)


def _upright(pixels: Image, image: Any) -> Image:
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # damaged metadata tell nothing; the pixels are whole
        return pixels
    turn = _TURNS.get(orientation)
    return np.ascontiguousarray(turn(pixels)) if turn else pixels
