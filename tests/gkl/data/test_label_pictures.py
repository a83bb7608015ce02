"""What people look at: small PNGs whose colours tell classes apart."""

import base64
import io

import numpy as np
import torch
from PIL import Image

from gkl.data.label_pictures import as_png, colour


def opened(png: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(png)))


def test_classes_have_colours_of_their_own_and_large_pictures_become_small() -> None:
    labels = torch.arange(256, dtype=torch.uint8).view(16, 16)
    shown = np.asarray(opened(as_png(labels)).convert("RGB"))
    assert shown.shape == (16, 16, 3) and len({tuple(c) for c in shown.reshape(-1, 3).tolist()}) == 256
    assert shown[0, 3].tolist() == list(colour(3)) and shown[15, 15].tolist() == [255, 255, 255]
    assert opened(as_png(torch.zeros(3, 200, 400, dtype=torch.uint8))).size == (96, 48)
    large = opened(as_png(labels.repeat_interleave(20, 0).repeat_interleave(20, 1)))
    assert (
        large.size == (96, 96)
        and len(np.unique(np.asarray(large.convert("RGB")).reshape(-1, 3), axis=0)) == 256
    )
