"""What needs more than a bare machine is skipped with its reason."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tests run side by side, one per core

import pytest
import torch

NEEDS = {
    "slow": (lambda: os.environ.get("RUN_SLOW") == "1", "takes minutes; RUN_SLOW=1 runs it"),
    "gpu": (torch.cuda.is_available, "needs a GPU that torch sees"),
    "data": (lambda: "GKL_TEST_DATA" in os.environ, "needs GKL_TEST_DATA, a folder with cifar10-jpeg.zip"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for name, (there, reason) in NEEDS.items():
            if item.get_closest_marker(name) and not there():
                item.add_marker(pytest.mark.skip(reason=reason))
