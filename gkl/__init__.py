"""Generalized Kullback-Leibler divergence loss and what its paper builds on it. Source: arXiv 2503.08038.

    from gkl import ClassPrior, gkl_loss    # or GKLLoss, an nn.Module that holds its prior

Pure parts for anyone's training loop: losses, class prior, attacks, weight perturbation and averaging, networks,
data, evaluation, records and tables. The loops that use them are in `trainers`.
`import gkl` imports nothing else, each name above when it is first used; losses, prior and attacks need torch alone.
"""

import sys
from importlib import import_module, util
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gkl.losses.closed_form import dkl, gkl_loss, ikl, jsd, kl
    from gkl.losses.modules import GKLLoss
    from gkl.losses.prior import ClassPrior

    __version__: str

__all__ = ["ClassPrior", "GKLLoss", "__version__", "dkl", "gkl_loss", "ikl", "jsd", "kl"]

HOMES = dict.fromkeys(("dkl", "gkl_loss", "ikl", "jsd", "kl"), "gkl.losses.closed_form") | {
    "GKLLoss": "gkl.losses.modules",
    "ClassPrior": "gkl.losses.prior",
}
NEEDS = {  # what a module imports beyond torch, and the extra that brings it
    "gkl.data.ade20k": ("data", ("PIL", "numpy", "torchvision")),
    "gkl.data.cifar": ("data", ("PIL", "numpy", "torchvision")),
    "gkl.data.crops": ("data", ("PIL", "numpy", "timm", "torchvision")),
    "gkl.data.decoding": ("data", ("PIL", "numpy", "torchvision")),
    "gkl.data.digit_questions": ("data", ("PIL",)),
    "gkl.data.digits": ("data", ("PIL", "numpy", "sklearn")),
    "gkl.data.few_labels": ("data", ("PIL", "numpy")),
    "gkl.data.files": ("data", ("PIL", "numpy")),
    "gkl.data.generated": ("data", ("numpy",)),
    "gkl.data.label_pictures": ("data", ("PIL",)),
    "gkl.data.layout": ("data", ("PIL", "numpy", "torchvision")),
    "gkl.data.memory": ("data", ("PIL", "numpy", "torchvision")),
    "gkl.data.mosaics": ("data", ("sklearn",)),
    "gkl.data.preparing": ("data", ("PIL", "numpy", "torchvision")),
    "gkl.data.pairs": ("data", ("numpy",)),
    "gkl.data.randaugment": ("data", ("PIL",)),
    "gkl.data.stores": ("data", ("PIL", "numpy", "torchvision")),
    "gkl.evaluation": ("evaluation", ("PIL", "numpy", "pyautoattack")),
    "gkl.models": ("models", ("safetensors", "timm", "torchvision")),
    "gkl.optim.optimizers": ("models", ("timm",)),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("gkl")
        except PackageNotFoundError:
            raise AttributeError("gkl has a version where it is installed: pip install .") from None
    if name not in HOMES:
        raise AttributeError(f"module 'gkl' has no attribute {name!r}")
    return getattr(import_module(HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Extras:
    """First of Python's finders: a module of NEEDS that lacks something fails in one line with the extra to install."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        extra, packages = NEEDS.get(name, ("", ()))
        missing = [p for p in packages if sys.modules.get(p) is None and util.find_spec(p) is None]
        if missing:
            raise ModuleNotFoundError(
                f"{name} needs {', '.join(missing)}: pip install 'gkl[{extra}]'", name=missing[0]
            )
        return None  # the other finders go on


sys.meta_path.insert(0, _Extras)
