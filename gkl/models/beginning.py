"""A network whose training begins from a checkpoint, which is known by its content.

model = begun(create("wrn_34_10", num_classes=10), checkpoint="cifar100.pt")
"""

import hashlib
from pathlib import Path

from torch import nn

from gkl.models.checkpoints import load_checkpoint


def begun(
    model: nn.Module, checkpoint: str | None, key: str | None = None, sha256: str | None = None
) -> nn.Module:
    """The model with a file's weights, and in its `__dict__` as "begun" a line on what was loaded; itself where checkpoint is None.

    A head for another number of classes stays as it was initialised. key: see load_checkpoint. sha256: of the file that is meant, None
    for any. Raises FileNotFoundError, ValueError.
    """
    if checkpoint is None:
        return model
    path = Path(checkpoint)
    report = load_checkpoint(model, path, key, any_classes=True)
    if sha256 is not None and hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise ValueError(
            f"{path} has changed since the run was started with it; bring it back, or start a new run"
        )
    model.__dict__["begun"] = f"begins from {path.name}: {report}"
    return model
