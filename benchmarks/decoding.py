"""From JPEG bytes to a training view of 224x224: Pillow against torchvision, interleaved in one run, one core.

    python benchmarks/decoding.py [--rounds 30] [--pictures folder-or-zip]

Without --pictures: scikit-learn's two photographs (427x640, about ImageNet's size). A view: decode, random resized crop, mirror
(train), or resize to 256 and the middle 224 (test). Prints the median over rounds of time(torchvision) / time(Pillow) with its
quartiles, and by how many grey levels the two differ.
"""

import argparse
import statistics
from functools import partial
from pathlib import Path

import torch
from sklearn.datasets import load_sample_images
from timing import timed

from gkl.data.crops import CentreCrop, ResizedCrop
from gkl.data.stores import decode, open_store


def photographs(path: str | None) -> list[bytes]:
    if path:
        store = open_store(Path(path))
        return [store.read(name) for name in store.names[:64]]
    folder = Path(load_sample_images.__globals__["__file__"]).parent / "images"
    return [file.read_bytes() for file in sorted(folder.glob("*.jpg"))]


def _views(
    files: list[bytes], crop: ResizedCrop | CentreCrop, decoder: str, number: int
) -> list[torch.Tensor]:
    return [crop(decode(file, decoder), 224, key=number * 1000 + n) for n, file in enumerate(files)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--pictures")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    files = photographs(arguments.pictures)
    crops = {"train": ResizedCrop(), "test": CentreCrop(256)}
    device = torch.device("cpu")
    for name, crop in crops.items():
        ratios, levels = [], []
        for number in range(arguments.rounds):
            pair = ("pillow", "torchvision") if number % 2 else ("torchvision", "pillow")
            times, made = {}, {}
            for decoder in pair:
                views = partial(_views, files, crop, decoder, number)
                times[decoder] = timed(views, device)
                made[decoder] = torch.stack(views()).float()
            ratios.append(times["torchvision"] / times["pillow"])
            levels.append((made["pillow"] - made["torchvision"]).abs().mean().item())
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"{name:5} torchvision / Pillow {middle:.3f} [{low:.3f}, {high:.3f}]; mean difference {max(levels):.3f} levels of 255"
        )


if __name__ == "__main__":
    main()
