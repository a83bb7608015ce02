"""Pictures and label maps as people look at them: small, a colour for each class.

as_png(labels)      # base64, for a record
"""

import base64
import io

import torch
from PIL import Image
from torch import Tensor

from gkl.data.dense import IGNORED

SHOWN = 96  # pixels of the long side


def as_png(picture: Tensor) -> str:
    """A small PNG in base64, for a record: of a picture (3, H, W) uint8, or of classes (H, W), each in its colour."""
    height, width = picture.shape[-2:]
    small = min(1.0, SHOWN / max(height, width))
    size = (max(1, round(width * small)), max(1, round(height * small)))
    if picture.ndim == 3:
        made = Image.fromarray(picture.cpu().permute(1, 2, 0).numpy()).resize(size, Image.Resampling.BILINEAR)
    else:
        made = Image.fromarray(picture.cpu().to(torch.uint8).numpy())
        made.putpalette([level for number in range(256) for level in colour(number)])
        made = made.resize(size, Image.Resampling.NEAREST)
    file = io.BytesIO()
    made.save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def colour(number: int) -> tuple[int, int, int]:
    """Of a class, neighbours far apart; white of IGNORED. The bits of number + 1, dealt out to red, green and blue from the top (PASCAL VOC's)."""
    if number == IGNORED:
        return (255, 255, 255)
    levels = [0, 0, 0]
    for place in range(8):
        levels[place % 3] |= ((number + 1) >> place & 1) << (7 - place // 3)
    return (levels[0], levels[1], levels[2])
