"""One picture from its bytes: the same pixels by either decoder, and none that a header could make crash.

decode(Path("n01440764_10026.JPEG").read_bytes(), "torchvision")     # (3, H, W) uint8
"""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
import torchvision
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

# What Pillow is asked to read; none of it starts another program, as PostScript would.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
PICTURES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".webp", ".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff",
    ".gif",
)  # fmt: skip
UNREAD = (
    ".heic", ".heif", ".avif", ".avifs", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".jxl", ".jxr", ".wdp", ".mpo", ".qoi", ".bpg",
    ".ico", ".icns", ".cur", ".dib", ".pcx", ".dcx", ".sgi", ".rgb", ".rgba", ".bw", ".ras", ".tga", ".icb", ".vda", ".vst", ".dds",
    ".blp", ".pam", ".pfm", ".hdr", ".exr", ".xbm", ".xpm", ".msp", ".im", ".pcd", ".pict", ".pct", ".palm", ".fli", ".flc", ".gbr",
    ".ftc", ".ftu", ".iim", ".pxr", ".psd", ".psb", ".xcf", ".kra", ".svg", ".svgz", ".eps", ".wmf", ".emf", ".dng", ".raw", ".cr2",
    ".cr3", ".crw", ".nef", ".nrw", ".arw", ".sr2", ".srf", ".orf", ".rw2", ".raf", ".srw", ".pef", ".x3f", ".3fr", ".fit", ".fits",
    ".fts", ".dcm", ".nii", ".mha", ".mhd", ".nrrd", ".npy", ".ps",
)  # fmt: skip
# How files begin that hold a picture whatever their names end in: JPEG, PNG, GIF, TIFF; RIFF holds WebP, and sound.
BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"II*\0", b"MM\0*")
PHOTOMETRIC = 262  # the tag of TIFF that says which end is white
PIXELS = 178_956_970  # of a picture, at most: Pillow's own bound
LONGEST = 1000  # times the other side: resized by the shorter one, a line of pixels would fill the memory
Decoder = Literal["pillow", "torchvision"]
# torchvision announces that its decoders will move to torchcodec; until they do they are the fastest (benchmarks/decoding.py).
warnings.filterwarnings("ignore", "The image decoding and encoding", DeprecationWarning, r"torchvision\.io")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # of half of PIXELS


def is_picture(start: bytes) -> bool:
    """Whether a file that begins so, with 12 bytes or more, holds a picture."""
    return start.startswith(BEGINNINGS) or (start[:4] == b"RIFF" and start[8:12] == b"WEBP")


class Unfit(ValueError):
    """A whole picture that is not read."""


def decode(data: bytes, decoder: Decoder) -> Image.Image | Tensor:
    """A picture in RGB: Pillow's, or for torchvision a (3, H, W) uint8 tensor. Raises ValueError for one that cannot be.

    Both give the same pixels: torchvision decodes JPEG in RGB or grey, and Pillow the rest. Of 16 bits the upper 8, of several
    frames the first; transparency and what Exif says of rotation are left out.
    """
    with opened(data) as picture:
        # Of damaged PNG torchvision ends the process (libpng's jump out of its C++), and it is no faster there.
        if decoder == "torchvision" and picture.format in ("JPEG", "MPO") and picture.mode in ("L", "RGB"):
            raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            return torchvision.io.decode_image(raw, torchvision.io.ImageReadMode.RGB)
        rgb = _in_rgb(picture)
    return rgb if decoder == "pillow" else pil_to_tensor(rgb)


@contextmanager
def opened(data: bytes, formats: tuple[str, ...] = FORMATS) -> Iterator[Image.Image]:
    """Pillow's picture of a file's bytes, of which the header alone is read yet. Raises ValueError saying why there is none, inside too."""
    try:
        with Image.open(io.BytesIO(data), formats=formats) as picture:
            width, height = picture.size
            if width * height > PIXELS:
                raise Image.DecompressionBombError
            if max(width, height) > LONGEST * min(width, height):
                raise Unfit(
                    f"is of {width} x {height} pixels, one side more than {LONGEST} times the other; replace or remove it"
                )
            yield picture
        return
    except Image.DecompressionBombError:
        raise ValueError(f"says that it has more than {PIXELS:,} pixels; replace or remove it") from None
    except UnidentifiedImageError:
        why = "it is no picture that is read here" if data else "it is empty"
    except Unfit:
        raise
    except Exception as error:  # of damaged bytes decoders raise anything
        why = re.sub(r"^.*\.cpp:\d+, ", "", " ".join(str(error).split()))[:200] or type(error).__name__
    raise ValueError(f"is damaged ({why}); replace or remove it")


def _in_rgb(picture: Image.Image) -> Image.Image:
    sixteen = picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM"))
    if sixteen:  # Pillow would cut off at 255
        levels = np.asarray(picture).astype(np.uint16)
        if picture.format == "TIFF" and getattr(picture, "tag_v2", {}).get(PHOTOMETRIC) == 0:
            levels = ~levels  # 0 is white, which Pillow sees to in 8 bits alone
        return Image.fromarray((levels >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode in ("I", "F"):
        raise Unfit(
            f"has pixels of 32 bits or signed ones (mode {picture.mode}), whose range nothing says; convert it to unsigned ones of 8 or 16 bits"
        )
    return picture.convert("RGB")
