"""A network whose training begins from a checkpoint, which is known by its content.

model = begun(create("wrn_34_10", num_classes=10), checkpoint="cifar100.pt")
"""

import hashlib
from pathlib import Path

from torch import nn

from gkl.models.checkpoints import keyed, load_checkpoint
from gkl.models.normalise import Normalise, taken


def begun(
    model: nn.Module, checkpoint: str | None, key: str | None = None, sha256: str | None = None
) -> nn.Module:
    """The model with a file's weights, and in its `__dict__` as "begun" a line on what was loaded; itself where checkpoint is None.

    A head for another number of classes stays as it was initialised. key: see load_checkpoint. sha256: of the file that is meant, None
    for any. Raises FileNotFoundError, ValueError; also for a normalisation in the file that the model was not made with: the weights
    that are trained from here do not hold it, only the configuration does.
    """
    if checkpoint is None:
        return model
    path, made_with = Path(checkpoint), getattr(model, "normalise", None)
    try:
        report = load_checkpoint(model, path, key, any_classes=True)
    except ValueError as error:
        error.args = (keyed(str(error), "model"),)
        raise
    if sha256 is not None and hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise ValueError(
            f"{path} has changed since the run was started with it; bring it back, or start a new run"
        )
    layer = getattr(model, "normalise", None)
    if layer is not made_with and isinstance(layer, Normalise):
        shown = ",".join(
            f"{name}:[{','.join(f'{value:.7g}' for value in values)}]"
            for name, values in layer.statistics().items()
        )
        raise ValueError(
            f"{path} normalises its pictures, and a training that begins from it must say so, as its weights will not: "
            f"model.normalisation={{{shown}}}"
        )
    how = "" if report.normalised else f"; {taken(model, 'model')}"
    model.__dict__["begun"] = f"begins from {path.name}: {report}{how}"
    return model
