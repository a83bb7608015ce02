"""Which test pictures are attacked: RobustBench's 5,000 of ImageNet by name, in its order."""

import hashlib
import os
import re
from pathlib import Path

import pytest
import torch

from gkl.data.files import ImageFiles, split
from gkl.data.stores import open_store
from gkl.evaluation.chosen import LIST_LENGTH, chosen, robustbench_numbers


def pictures(folder: Path, names: list[str]) -> ImageFiles:
    """As many test pictures as names, of which none is read."""
    files = split(open_store(folder), [(f"val/n01440764/{name}", 0) for name in names])
    return ImageFiles("imagenet", ("n01440764",), files, files, 224, 256, "pillow")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "val/n01440764").mkdir(parents=True)
    (tmp_path / "val/n01440764/a.JPEG").touch()
    return tmp_path


def test_robustbench_s_list_by_name_in_its_order(folder: Path) -> None:
    """Expected: the digest of the numbers in helper_files/imagenet_test_image_ids.txt of RobustBench 1.1.1, in their order."""
    numbers = robustbench_numbers()
    found = hashlib.sha256(" ".join(map(str, numbers)).encode()).hexdigest()
    assert found == "d1bc80ca82e05f8717d866ac3697ceb8a3072b657d9d1c9054949b0c1e0b2a3d"
    assert len(set(numbers)) == LIST_LENGTH
    order = torch.randperm(50_000, generator=torch.Generator().manual_seed(0)) + 1
    data = pictures(folder, [f"ILSVRC2012_val_{n:08d}.JPEG" for n in order.tolist()])
    assert order[chosen(data, "robustbench")].tolist() == numbers


def test_other_pictures_are_refused_before_anything_is_measured(folder: Path) -> None:
    names = [f"ILSVRC2012_val_{n:08d}.JPEG" for n in robustbench_numbers()[:-2]]
    with pytest.raises(ValueError, match=r"2 of 5,000 are not among the 4,998 .* evaluation.images=N"):
        chosen(pictures(folder, names), "robustbench")


@pytest.mark.skipif(
    "ROBUSTBENCH_REF" not in os.environ, reason="needs ROBUSTBENCH_REF, a checkout of RobustBench"
)
def test_the_list_is_robustbench_s_file() -> None:
    file = Path(os.environ["ROBUSTBENCH_REF"]) / "robustbench/helper_files/imagenet_test_image_ids.txt"
    lines = file.read_text(encoding="utf-8").splitlines()
    assert [int(re.search(r"val_(\d{8})", line)[1]) for line in lines] == robustbench_numbers()  # type: ignore[index]
