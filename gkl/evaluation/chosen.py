"""Which test pictures are attacked: all, so many with the classes taking turns, or the list of a leaderboard.

chosen(data, 1000)             # (1000,) numbers of test pictures
chosen(data, "robustbench")    # (5000,) those of RobustBench's ImageNet table, in its order
"""

import re
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from gkl.data.batches import first_of_each_class

Chosen = int | Literal["robustbench"] | None  # None: the whole test set
LIST_LENGTH = 5000


def chosen(data: Any, images: Chosen) -> Tensor:
    """Their numbers in the data's test set, (N,) int64. data: of gkl.data.

    Raises ValueError where a list is asked for and its pictures are not there by name.
    """
    if images != "robustbench":
        return first_of_each_class(data.test_labels, images)
    names = [] if data.in_memory else data.test.names.tolist()
    number_of = {
        int(found[1]): number
        for number, name in enumerate(names)
        if (found := re.search(rb"ILSVRC2012_val_(\d{8})\.", name))
    }
    wanted = robustbench_numbers()
    if lacking := [n for n in wanted if n not in number_of]:
        raise ValueError(
            f"evaluation.images=robustbench needs ImageNet's validation pictures under their own names; {len(lacking):,} of "
            f"{len(wanted):,} are not among the {len(data.test_labels):,} test pictures of {data.name}, the first is "
            f"ILSVRC2012_val_{lacking[0]:08d}; use data=imagenet, or evaluation.images=N for the first N of your own"
        )
    return torch.tensor([number_of[n] for n in wanted])


def robustbench_numbers() -> list[int]:
    """Which of ILSVRC2012_val_00000001 to 50000. Source: RobustBench, helper_files/imagenet_test_image_ids.txt."""
    text = (Path(__file__).parent / "robustbench_imagenet.txt").read_text(encoding="ascii")
    return [int(number) for number in text.split()]
