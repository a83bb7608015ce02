"""Pictures as people have them: the same pixels by either decoder, or refused; nothing that bytes hold can crash one."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from gkl.data.decoding import FORMATS, decode

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 8, 4), dtype=np.uint8)
RGB, GREY = PIXELS[..., :3], PIXELS[..., 0]
FRAMES = [Image.fromarray(RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)) for _ in range(3)]
LARGE = Image.fromarray(RGB).resize((64, 48), Image.Resampling.NEAREST)


def saved(picture: Image.Image, kind: str, **settings: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **settings)  # type: ignore[arg-type]
    return file.getvalue()


def moving(kind: str, **settings: object) -> bytes:
    return saved(FRAMES[0], kind, save_all=True, append_images=FRAMES[1:], **settings)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(height: int, width: int, bits: int, colour: int, rows: bytes) -> bytes:
    """Written by hand: Pillow writes none of 16 bits in colour. colour: 0 grey, 2 RGB, 4 grey and alpha, 6 RGB and alpha."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def png16(values: NDArray[np.uint16], colour: int) -> bytes:
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png(*values.shape[:2], 16, colour, rows)


def white_is_zero(values: NDArray[np.unsignedinteger]) -> bytes:
    """A TIFF of a scanner's whose tag 262 says that 0 is white, as its bytes are written by hand."""
    height, width = values.shape
    data, bits = (~values).tobytes(), 8 * values.itemsize
    tags = [
        (256, width),
        (257, height),
        (258, bits),
        (259, 1),
        (262, 0),
        (273, 8),
        (277, 1),
        (278, height),
        (279, len(data)),
    ]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    header = struct.pack("<2sHI", b"II", 42, 8 + len(data))
    return header + data + struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)


def rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x112] = 6  # Orientation: a quarter turn
    return exif


DEEP = RNG.integers(0, 65536, (6, 8, 4), dtype=np.uint16)
UPPER = (DEEP >> 8).astype(np.uint8)
PALETTE = Image.fromarray(RGB).quantize(16)
SHOWN: dict[str, tuple[bytes, NDArray[np.uint8]]] = {
    "grey": (saved(Image.fromarray(GREY), "PNG"), GREY),
    "one bit": (saved(Image.fromarray(GREY > 127), "PNG"), np.where(GREY > 127, 255, 0).astype(np.uint8)),
    "16 bits, grey": (png16(DEEP[..., 0], 0), UPPER[..., 0]),
    "16 bits, grey and alpha": (png16(DEEP[..., :2], 4), UPPER[..., 0]),
    "16 bits, RGB": (png16(DEEP[..., :3], 2), UPPER[..., :3]),
    "16 bits, RGB and alpha": (png16(DEEP, 6), UPPER[..., :3]),
    "16 bits, TIFF": (saved(Image.fromarray(DEEP[..., 0]), "TIFF"), UPPER[..., 0]),
    "16 bits, TIFF, 0 is white": (white_is_zero(DEEP[..., 0]), UPPER[..., 0]),
    "8 bits, TIFF, 0 is white": (white_is_zero(UPPER[..., 0]), UPPER[..., 0]),
    "16 bits, PGM": (b"P5\n8 6\n65535\n" + DEEP[..., 0].astype(">u2").tobytes(), UPPER[..., 0]),
    "palette": (saved(PALETTE, "PNG"), np.asarray(PALETTE.convert("RGB"))),
    "palette, transparent": (saved(PALETTE, "PNG", transparency=3), np.asarray(PALETTE.convert("RGB"))),
    "a transparent colour": (saved(Image.fromarray(RGB), "PNG", transparency=(1, 2, 3)), RGB),
    "grey and alpha": (saved(Image.fromarray(PIXELS[..., :2], "LA"), "PNG"), GREY),
    "RGB and alpha": (saved(Image.fromarray(PIXELS, "RGBA"), "PNG"), RGB),
    "WebP and alpha": (saved(Image.fromarray(PIXELS, "RGBA"), "WEBP", lossless=True, exact=True), RGB),
    "rotated by Exif, PNG": (saved(Image.fromarray(RGB), "PNG", exif=rotated()), RGB),
    "rotated by Exif, WebP": (saved(Image.fromarray(RGB), "WEBP", exif=rotated(), lossless=True), RGB),
    "APNG": (moving("PNG"), np.asarray(FRAMES[0])),
    "APNG, first frame apart": (moving("PNG", default_image=True), np.asarray(FRAMES[0])),
    "WebP, moving": (moving("WEBP", lossless=True), np.asarray(FRAMES[0])),
    "TIFF of pages": (moving("TIFF"), np.asarray(FRAMES[0])),
    "GIF": (saved(PALETTE, "GIF"), np.asarray(PALETTE.convert("RGB"))),
    **{kind: (saved(Image.fromarray(RGB), kind), RGB) for kind in ("BMP", "PPM", "TIFF")},
}  # fmt: skip
# Lossy: what they show is Pillow's to say.
LOSSY = {
    "JPEG": saved(LARGE, "JPEG"),
    "JPEG, grey": saved(LARGE.convert("L"), "JPEG"),
    "JPEG, CMYK": saved(LARGE.convert("CMYK"), "JPEG"),
    "JPEG, progressive": saved(LARGE, "JPEG", progressive=True),
    "JPEG, rotated by Exif": saved(LARGE, "JPEG", exif=rotated()),
    "JPEG, two pictures": saved(LARGE, "MPO", save_all=True, append_images=[LARGE]),
    "GIF, moving": moving("GIF"),
    "WebP": saved(LARGE, "WEBP"),
}


def both(data: bytes) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    one, other = decode(data, "pillow"), decode(data, "torchvision")
    assert isinstance(other, torch.Tensor) and other.dtype == torch.uint8 and other.shape[0] == 3
    return np.asarray(one), other.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("kind", SHOWN)
def test_every_kind_of_picture_has_its_pixels_by_either_decoder(kind: str) -> None:
    data, expected = SHOWN[kind]
    expected = expected if expected.ndim == 3 else np.repeat(expected[..., None], 3, axis=2)
    for pixels in both(data):
        assert np.array_equal(pixels, expected)


@pytest.mark.parametrize("kind", LOSSY)
def test_lossy_pictures_are_the_same_by_either_decoder(kind: str) -> None:
    one, other = both(LOSSY[kind])
    assert np.array_equal(one, other)
    if "JPEG" in kind:  # as it is stored, whatever Exif says
        assert one.shape == (48, 64, 3)


BOMB_JPEG = bytearray(LOSSY["JPEG"])
AT = BOMB_JPEG.index(b"\xff\xc0")
BOMB_JPEG[AT + 5 : AT + 9] = struct.pack(">HH", 65000, 65000)
REFUSED = {
    "empty": (b"", r"is damaged \(it is empty\)"),
    "text": (b"no picture", r"is damaged \(it is no picture that is read here\)"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "no picture that is read here"),
    "a cut PNG": (SHOWN["RGB and alpha"][0][:-60], r"is damaged \("),
    "a cut JPEG": (LOSSY["JPEG"][:-200], r"is damaged \("),
    "a PNG's header": (png(100_000, 100_000, 8, 2, b"\0" * 1000), "says that it has more than 178,956,970 pixels"),
    "a JPEG's header": (bytes(BOMB_JPEG), "says that it has more than 178,956,970 pixels"),
    "a BMP's header": (b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 50_000, 50_000, 1, 24, 0, 0, 0, 0, 0, 0), "pixels"),
    "floats": (saved(Image.fromarray(GREY.astype(np.float32)), "TIFF"), r"has pixels of 32 bits .*\(mode F\)"),
    "32 bits": (saved(Image.fromarray(GREY.astype(np.int32)), "TIFF"), r"has pixels of 32 bits or signed ones \(mode I\).* unsigned"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("decoder", ["pillow", "torchvision"])
def test_what_is_no_picture_is_refused_in_one_line(
    kind: str, decoder: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of a header that claims 30 GB nothing is taken from the system, which torch would have written to stderr."""
    data, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message) as raised:
        decode(data, decoder)  # type: ignore[arg-type]
    assert "\n" not in str(raised.value) and "/" not in str(raised.value)
    assert "CPUAllocator" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "kind", ["RGB and alpha", "16 bits, TIFF", "APNG", "GIF", "BMP", "PPM", "WebP", "JPEG, CMYK"]
)
def test_bytes_that_were_changed_give_a_picture_or_a_refusal(kind: str) -> None:
    """Nothing else: a decoder's own errors would end a run in a traceback."""
    whole = SHOWN[kind][0] if kind in SHOWN else LOSSY[kind]
    generator = np.random.default_rng(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow has some to say of damaged TIFF
        for _ in range(60):
            data = bytearray(whole)
            for place in generator.integers(0, len(data), 3):
                data[place] = generator.integers(0, 256)
            for decoder in ("pillow", "torchvision"):
                try:
                    decode(bytes(data[: generator.integers(1, len(data) + 1)]), decoder)  # type: ignore[arg-type]
                except ValueError as error:
                    assert "\n" not in str(error)


def test_pillow_knows_the_formats() -> None:
    Image.init()
    assert set(FORMATS) <= set(Image.OPEN)
