"""Networks by name, through timm's registry, and the weights that others have published for them.

model = create("wrn_34_10", num_classes=100)
print(load_checkpoint(model, "cifar100_a4b20t4.pt"))
"""

import difflib
from collections.abc import Mapping
from functools import partial
from typing import Any

import timm
from torch import nn

from gkl.lines import one_line
from gkl.models import (  # noqa: F401  (importing registers their networks with timm)
    cifar_resnet,
    imagenet_resnet,
    mobilenet_v1,
    mobilenet_v2,
    preact_resnet,
    pspnet,
    resnet,
    shufflenet,
    vgg,
    vit,
    wide_resnet,
)
from gkl.models.beginning import begun
from gkl.models.checkpoints import load_checkpoint
from gkl.models.load_report import CheckpointMismatch, LoadReport
from gkl.models.normalise import Normalisation
from gkl.models.timm_network import TimmNetwork

__all__ = ["CheckpointMismatch", "LoadReport", "create", "load_checkpoint"]


def create(
    name: str,
    num_classes: int,
    normalisation: Normalisation = None,
    timm_options: Mapping[str, Any] | None = None,
    checkpoint: str | None = None,
    checkpoint_key: str | None = None,
    checkpoint_sha256: str | None = None,
    **options: Any,
) -> nn.Module:
    """A network, freshly initialised or from a checkpoint: images (B, 3, H, W) in [0, 1] to logits (B, num_classes).

    name: any of timm's or ours. normalisation: whose statistics it shifts and scales images by, a name in STATISTICS,
    its own mean and std, or none; None: as the network has it by itself. timm_options, options: what
    else timm's, or our, network takes. checkpoint: see gkl.models.beginning.begun.
    Raises ValueError for an unknown name, naming the closest ones, and for fewer than two classes.
    """
    if not timm.is_model(name):
        spelt = name.lower().replace("-", "_")
        closest = difflib.get_close_matches(spelt, timm.list_models(), n=3, cutoff=0.0)
        raise ValueError(f"no network is called {name!r}; the closest names are {', '.join(closest)}")
    if num_classes < 2:
        raise ValueError(f"a classifier needs num_classes >= 2, got {num_classes}")
    begin = partial(begun, checkpoint=checkpoint, key=checkpoint_key, sha256=checkpoint_sha256)
    entry = timm.model_entrypoint(name)
    if not entry.__module__.startswith("gkl."):
        if hidden := sorted({"pretrained", "checkpoint_path"} & {*(timm_options or {})}):
            raise ValueError(
                f"timm_options.{hidden[0]} loads weights that a run would not be known by; name their file: model.checkpoint=FILE"
            )
        given = {**options, **(timm_options or {})}
        try:
            made = timm.create_model(name, num_classes=num_classes, **given)
        except Exception as error:  # whatever its parts raise of what they do not take
            why = one_line(f"{type(error).__name__}: {error}".removesuffix(": "))
            raise ValueError(
                f"timm cannot make {name} with {given or 'its own settings'} ({why}); set model.timm_options=... to what it takes"
            ) from error
        return begin(TimmNetwork(made, normalisation))
    if timm_options:
        raise ValueError(f"timm_options are for timm's own networks, {name} is not one; leave them out")
    if normalisation is not None:
        options["normalisation"] = normalisation
    return begin(timm.create_model(name, num_classes=num_classes, **options))
