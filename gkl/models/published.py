"""Weights that torchvision, timm and OpenCLIP publish, by name: which file they are, and how to fetch it.

file = folder / file_name("torchvision/ResNet34_Weights.IMAGENET1K_V1")       # resnet34-b627a593.pth
fetch("torchvision/ResNet34_Weights.IMAGENET1K_V1", file)
"""

import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torchvision

from gkl.atomic import atomically
from gkl.models.checkpoint_files import read, state_dict
from gkl.models.clip import open_clip


def file_name(name: str) -> Path:
    """Where below a folder of teachers the weights called `name` lie; names see trainers.runs.teacher.Teacher."""
    origin, _, weights = name.partition("/")
    if origin == "torchvision":
        return Path(_torchvision(weights).rpartition("/")[2])
    if origin == "timm":
        return Path(f"{weights}.safetensors")
    if origin == "open_clip":
        return Path(f"{weights.replace('/', '-')}.pt")
    return (
        Path(name)
        if Path(name).suffix in (".pth", ".pt", ".safetensors")
        else Path(name) / "ckpt_epoch_240.pth"
    )


def fetch(name: str, file: Path) -> None:
    """Download torchvision's, timm's or OpenCLIP's weights to a file, whole or not at all; other names are left alone.

    Raises OSError, RuntimeError or ValueError when they cannot be had or are damaged.
    """
    origin, _, weights = name.partition("/")
    if origin not in ("torchvision", "timm", "open_clip"):
        return
    with atomically(file) as temporary:
        if origin == "torchvision":
            digest = re.search(r"-([0-9a-f]{8})\.", file.name)
            torch.hub.download_url_to_file(
                _torchvision(weights), str(temporary), digest[1] if digest else None, progress=False
            )
        elif origin == "open_clip":
            torch.save(_open_clip(*weights.split("/")), temporary)
        else:
            from huggingface_hub import hf_hub_download

            shutil.copyfile(hf_hub_download(f"timm/{weights}", "model.safetensors"), temporary)


def _torchvision(weights: str) -> str:
    """URL of a torchvision weights entry. Raises ValueError for an unknown one."""
    return str(torchvision.models.get_weight(weights).url)


def _open_clip(network: str, tag: str) -> dict[str, Any]:
    """The state dict of ("ViT-L-14", "datacomp_xl_s13b_b90k"). Raises ValueError for an unknown one."""
    package = open_clip()
    config = package.get_pretrained_cfg(network, tag)
    if not config:
        known = ", ".join(package.list_pretrained_tags_by_model(network))
        raise ValueError(f"OpenCLIP has no weights {tag} of {network}; there are {known or 'none of it'}")
    try:
        found = Path(package.download_pretrained(config))
    except Exception as error:  # of its hub, whose errors are of many kinds
        raise OSError(" ".join(str(error).split())[:300]) from error
    return dict(state_dict(read(found), found, None)[0])
