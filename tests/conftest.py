"""What needs more than a bare machine is skipped with its reason; what does not ask for a GPU sees none.

A test with the marker `gpu` has the machine's GPU. For every other one, its fixtures and the processes it starts included, the
machine has none, so that the suite is the same with a GPU as without, also where one process runs tests of both kinds.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tests run side by side, one per core
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import pytest
import torch
from PIL import Image

from gkl.data.digits import digits


@pytest.fixture(scope="session", autouse=True)
def own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a person has named is noted in a folder of the tests'."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


def answers(*command: str) -> bool:
    """Whether a program is there and says it is well."""
    return (
        bool(shutil.which(command[0]))
        and subprocess.run(command, capture_output=True, check=False).returncode == 0
    )


def may_make_namespaces() -> bool:
    """Tried, with a namespace of the test's own name that is taken away again."""
    name = f"gkl-{os.getpid()}"
    return answers("ip", "netns", "add", name) and answers("ip", "netns", "del", name)


NEEDS = {
    "slow": (lambda: os.environ.get("RUN_SLOW") == "1", "takes minutes; RUN_SLOW=1 runs it"),
    "gpu": (torch.cuda.is_available, "needs a GPU that torch sees"),
    "data": (lambda: "GKL_TEST_DATA" in os.environ, "needs GKL_TEST_DATA, a folder with cifar10-jpeg.zip"),
    "slurm": (lambda: answers("sinfo"), "needs a Slurm controller that answers sinfo"),
    "browser": (lambda: bool(shutil.which("chromium")), "needs Chromium on the PATH"),
    "namespaces": (may_make_namespaces, "needs the right to make network namespaces"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for name, (there, reason) in NEEDS.items():
            if item.get_closest_marker(name) and not there():
                item.add_marker(pytest.mark.skip(reason=reason))


@contextmanager
def gpu_hidden() -> Iterator[None]:
    """Inside, neither this process nor one that it starts sees a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch.cuda, "device_count", lambda: 0)
        patch.setenv(
            "CUDA_VISIBLE_DEVICES", ""
        )  # this process has asked for its GPUs before, if it has tests for them
        forget_gpu()
        yield
    forget_gpu()


def forget_gpu() -> None:
    """torch.compile asks once in a process whether Triton has a GPU to work for."""
    for answer in (
        vars(sys.modules["torch.utils._triton"]).values() if "torch.utils._triton" in sys.modules else ()
    ):
        if hasattr(answer, "cache_clear"):
            answer.cache_clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    with nullcontext() if item.get_closest_marker("gpu") else gpu_hidden():
        return (yield)


@pytest.fixture(scope="session")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 training and 8 test scans of four digits as picture files: a step takes a tenth of a second."""
    root, data = tmp_path_factory.mktemp("scans"), digits()
    for split, images, labels, count in (
        ("train", data.train_images, data.train_labels, 40), ("test", data.test_images, data.test_labels, 2),
    ):  # fmt: skip
        for c in range(4):
            (root / split / str(c)).mkdir(parents=True)
            for i, picture in enumerate(images[labels == c][:count]):
                Image.fromarray(picture.permute(1, 2, 0).numpy()).save(root / split / str(c) / f"{i:02}.png")
    os.environ["GKL_TEST_SCANS"] = str(root)
    return root
