"""Decoding: every mode that Pillow gives becomes the picture that is meant, or is refused."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from data_echo import DataError, ExampleError, InlinePreparer, ParquetSource, PrepareRequest, images

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
GREY = PIXELS[..., 0]


def encoded(image: Image.Image, kind: str = "PNG", **how: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def grey_as_rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, 2)


def with_alpha(mode: str) -> Image.Image:
    image = Image.fromarray(PIXELS if mode == "RGBA" else GREY)
    image.putalpha(Image.fromarray(255 - GREY))
    assert image.mode == mode
    return image


def palette(**how: Any) -> bytes:
    image = Image.fromarray(GREY // 16, "P")
    image.putpalette([shade for index in range(16) for shade in (index * 16, 255 - index, index)])
    return encoded(image, **how)


PALETTE = np.stack([GREY // 16 * 16, 255 - GREY // 16, GREY // 16], 2)
KINDS: dict[str, tuple[Callable[[], bytes], np.ndarray]] = {
    "1": (lambda: encoded(Image.fromarray(GREY > 99)), grey_as_rgb((GREY > 99) * np.uint8(255))),
    "L": (lambda: encoded(Image.fromarray(GREY)), grey_as_rgb(GREY)),
    "LA": (lambda: encoded(with_alpha("LA")), grey_as_rgb(GREY)),
    "RGB": (lambda: encoded(Image.fromarray(PIXELS)), PIXELS),
    "RGBA": (lambda: encoded(with_alpha("RGBA")), PIXELS),
    "RGBA webp": (lambda: encoded(with_alpha("RGBA"), "WEBP", lossless=True, exact=True), PIXELS),
    "RGBX": (lambda: encoded(Image.fromarray(PIXELS).convert("RGBX"), "TIFF"), PIXELS),
    "P": (palette, PALETTE),
    "P, one transparent": (lambda: palette(transparency=3), PALETTE),
    "P with alpha": (lambda: palette(transparency=bytes(range(16))), PALETTE),
    "16 bits": (lambda: encoded(Image.fromarray(GREY.astype(np.uint16) * 257)), grey_as_rgb(GREY)),
    "16 bits, high": (lambda: encoded(Image.fromarray(GREY.astype(np.uint16) << 8)), grey_as_rgb(GREY)),
    "16 bits tiff": (
        lambda: encoded(Image.fromarray(GREY.astype(np.uint16) << 8), "TIFF"),
        grey_as_rgb(GREY),
    ),
    "16 bits >": (
        lambda: encoded(Image.fromarray((GREY.astype(np.uint16) << 8).astype(">u2")), "TIFF"),
        grey_as_rgb(GREY),
    ),
    "16 bits jp2": (
        lambda: encoded(Image.fromarray(GREY.astype(np.uint16) << 8), "JPEG2000", irreversible=False),
        grey_as_rgb(GREY),
    ),
    "CMYK tiff": (lambda: encoded(Image.fromarray(PIXELS).convert("CMYK"), "TIFF"), PIXELS),
    "BMP": (lambda: encoded(Image.fromarray(PIXELS), "BMP"), PIXELS),
    "frames": (
        lambda: encoded(
            Image.fromarray(PIXELS),
            "WEBP",
            save_all=True,
            append_images=[Image.new("RGB", (9, 6))],
            lossless=True,
        ),
        PIXELS,
    ),
    "pages": (
        lambda: encoded(
            Image.fromarray(PIXELS), "TIFF", save_all=True, append_images=[Image.new("RGB", (9, 6))]
        ),
        PIXELS,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_of_every_kind_are_read_as_they_are_meant(kind: str) -> None:
    make, expected = KINDS[kind]
    image = images.decode(make())
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, expected)


def test_premultiplied_alpha_and_colour_spaces_are_converted() -> None:
    opaque = Image.new("La", (9, 6), (70, 255))
    np.testing.assert_array_equal(images._eight_bits(opaque), np.full((6, 9, 3), 70))
    for mode in ("YCbCr", "HSV", "RGBa"):
        image = Image.fromarray(PIXELS)
        image = image.convert("RGBA").convert(mode) if mode == "RGBa" else image.convert(mode)
        assert np.abs(images._eight_bits(image).astype(int) - PIXELS).max() <= 6, mode
    even = Image.new("RGB", (9, 6), (180, 90, 40))
    lab = ImageCms.applyTransform(
        even,
        ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"),
    )
    try:
        back = images.decode(encoded(lab, "TIFF"))
    except DataError:
        return  # an older Pillow, which cannot convert it
    assert np.abs(back.astype(int) - [180, 90, 40]).max() <= 4


@pytest.mark.parametrize("without_simplejpeg", [False, True])
def test_jpegs_of_four_colours_are_not_inverted(
    without_simplejpeg: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if without_simplejpeg:
        monkeypatch.setattr(images, "simplejpeg", None)
    even = Image.new("RGB", (16, 16), (200, 100, 50))
    data = encoded(even.convert("CMYK"), "JPEG", quality=95)
    assert b"Adobe" in data
    assert np.abs(images.decode(data).astype(int) - [200, 100, 50]).max() <= 4


@pytest.mark.parametrize(
    "data",
    [
        encoded(Image.fromarray(GREY.astype(np.int32)), "TIFF"),
        encoded(Image.fromarray(GREY.astype(np.float32)), "TIFF"),
        encoded(Image.fromarray(GREY.astype(np.uint16)), "TIFF", tiffinfo={262: 0}),
        encoded(Image.fromarray(GREY.astype(np.uint16)), "PPM"),
    ],
    ids=["32 bits", "floating point", "white is zero", "PGM of 16 bits"],
)
def test_pictures_of_unknown_range_are_refused(data: bytes) -> None:
    with pytest.raises(
        DataError, match=r"image: \w+ of mode \S+, whose black and white are not known; 8 bits"
    ):
        images.decode(data)


def test_a_refused_picture_is_named_with_file_and_row(tmp_path: Path) -> None:
    pictures = [KINDS["L"][0](), encoded(Image.fromarray(GREY.astype(np.float32)), "TIFF"), None]
    pq.write_table(pa.table({"img": pa.array(pictures, pa.binary())}), tmp_path / "0.parquet")

    class Pictures:
        def source(self, split: str) -> ParquetSource:
            return ParquetSource(tmp_path)

        def prepare(self, example: dict[str, Any], draw: Any) -> dict[str, Any]:
            return {"image": images.decode(example["img"])}

    for row, why in ((1, "DataError: image: TIFF of mode F"), (2, "DataError: image: a NoneType")):
        with pytest.raises(ExampleError, match=rf"train: example {row} \(\S*0.parquet:{row}\): {why}"):
            InlinePreparer(Pictures(), 0).collect(PrepareRequest("train", np.zeros(1, int), np.array([row])))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("orientation", range(10))
def test_the_orientation_is_applied(kind: str, mode: str, orientation: int, monkeypatch: Any) -> None:
    if mode == "CMYK" and kind in ("PNG", "WEBP"):
        pytest.skip("the format has no such pictures")
    exif = Image.Exif()
    exif[274] = orientation
    image = Image.fromarray(np.kron(PIXELS, np.ones((8, 8, 1), np.uint8))).convert(mode)
    data = encoded(image, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    np.testing.assert_array_equal(images.decode(data), expected)
    monkeypatch.setattr(images, "simplejpeg", None)
    np.testing.assert_array_equal(images.decode(data), expected)


def test_the_orientation_in_xmp_is_applied_by_both_decoders(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.fromarray(PIXELS), "JPEG", xmp=b'<x tiff:Orientation="6"/>')
    upright = images.decode(data)
    assert upright.shape == (9, 6, 3)
    monkeypatch.setattr(images, "simplejpeg", None)
    np.testing.assert_array_equal(images.decode(data), upright)


def test_damaged_metadata_leave_the_picture_as_it_is() -> None:
    data = encoded(Image.fromarray(PIXELS), "JPEG", exif=b"Exif\0\0nonsense")
    plain = encoded(Image.fromarray(PIXELS), "JPEG")
    np.testing.assert_array_equal(images.decode(data), images.decode(plain))


@pytest.mark.parametrize("without_simplejpeg", [False, True])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_pictures_that_would_fill_the_memory_are_refused(
    kind: str, without_simplejpeg: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if without_simplejpeg:
        monkeypatch.setattr(images, "simplejpeg", None)
    data = bytearray(encoded(Image.new("RGB", (16, 16)), kind))
    if kind == "JPEG":
        place = data.index(b"\xff\xc0") + 5
        data[place : place + 4] = b"\xff\x00\xff\x00"
    else:
        import zlib

        data[16:24] = (60_000).to_bytes(4, "big") * 2
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    with pytest.raises(DataError, match=r"image: .*pixels"):
        images.decode(bytes(data))


@pytest.mark.parametrize("data", [None, "picture.jpg", 3, np.zeros(4, np.uint8)])
def test_what_is_not_bytes_is_named(data: Any) -> None:
    with pytest.raises(DataError, match=f"image: a {type(data).__name__}; the bytes of a JPEG or PNG"):
        images.decode(data)


WHOLE = {
    kind: encoded(Image.fromarray(np.kron(PIXELS, np.ones((4, 4, 1), np.uint8))), kind)
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "JPEG2000")
}


@settings(max_examples=300)
@given(kind=st.sampled_from(sorted(WHOLE)), cut=st.floats(0, 1, exclude_max=True))
def test_a_cut_picture_is_refused_or_whole(kind: str, cut: float) -> None:
    whole = WHOLE[kind]
    try:
        image = images.decode(whole[: int(cut * len(whole))])
    except DataError:
        return
    np.testing.assert_array_equal(image, images.decode(whole))


@settings(max_examples=300)
@given(kind=st.sampled_from(sorted(WHOLE)), place=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255))
def test_a_damaged_picture_is_a_picture_or_refused(kind: str, place: float, byte: int) -> None:
    damaged = bytearray(WHOLE[kind])
    damaged[int(place * len(damaged))] = byte
    try:
        image = images.decode(bytes(damaged))
    except DataError:
        return
    assert image.dtype == np.uint8
    assert image.shape[2] == 3
