"""A person's own network where this package's are expected.

model = own("Net@9f86d081884c7d65", num_classes=10, folder="outputs/networks")     # see gkl.own for the name
check_answers(model, image_size=32)

What makes it is a class or function that takes num_classes and gives an nn.Module from pictures (B, 3, H, W) in [0, 1] to logits
(B, num_classes).
"""

import copy
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedParameter
from torch.utils import checkpoint

from gkl.models.batch_norm import eval_mode
from gkl.models.beginning import begun
from gkl.models.classifier import TappedClassifier, dtype_of
from gkl.models.normalise import Normalisation, described, normaliser, statistics_within
from gkl.models.timm_network import TimmNetwork, keyed_drop_path
from gkl.own import maker

SAME = 0.01  # of the largest logit: how far a picture's logits may lie apart in half precision and batches of two sizes


class OwnNetwork(TimmNetwork):
    """A person's module behind its normalisation; feature methods find no stages in it."""

    def __init__(self, model: nn.Module, num_classes: int, normalisation: Normalisation = None) -> None:
        """model: (B, 3, H, W) in [0, 1] -> logits (B, num_classes). Raises ValueError for one that normalises, and would twice."""
        if normalisation not in (None, "none") and (has := statistics_within(model)):
            raise ValueError(
                f"{type(model).__name__} normalises its pictures by {described(has[0])} itself, and model.normalisation would once more; "
                "leave one of them out"
            )
        TappedClassifier.__init__(self, num_classes, int(getattr(model, "num_features", 0)))
        self.model: Any = keyed_drop_path(model)
        self.normalise = normaliser(normalisation)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> logits (B, num_classes). Raises ValueError for what else the module returns."""
        logits: Any = self.model(self.normalise(x))
        if not isinstance(logits, Tensor) or logits.shape != (len(x), self.num_classes):
            raise ValueError(
                f"{type(self.model).__name__} returns {_got(logits)}; a network returns its logits alone, ({len(x)}, {self.num_classes}) here"
            )
        return logits


def own(
    name: str,
    num_classes: int,
    folder: str,
    normalisation: Normalisation = None,
    options: Mapping[str, Any] | None = None,
    checkpoint: str | None = None,
    checkpoint_key: str | None = None,
    checkpoint_sha256: str | None = None,
) -> nn.Module:
    """The network of a whole name. folder: of `keep`. options: what else its class or function takes. checkpoint: see `begun`.

    Raises ValueError where it is neither kept nor installed, and for what makes no network.
    """
    make, short = maker(name, Path(folder)), name.rpartition("@")[0]
    try:
        module = make(num_classes=num_classes, **(options or {}))
    except TypeError as error:
        raise ValueError(f"{short} cannot be made with num_classes={num_classes}: {error}") from error
    if not isinstance(module, nn.Module):
        raise ValueError(f"{short} gives a {type(module).__name__}, which is no nn.Module")
    made = OwnNetwork(module, num_classes, normalisation)
    return begun(made, checkpoint, checkpoint_key, checkpoint_sha256)


def check_answers(
    model: nn.Module, image_size: int, attacked: bool = False, trained: bool = False, evaluated: bool = False
) -> None:
    """That a network of other people's takes pictures of this size and answers with logits, in either mode, and in eval mode to each
    picture by itself; ours do. attacked: and that its logits have a gradient to the pictures. trained: and that a backward pass
    does not compute batch norm a second time. evaluated: eval mode is all there is, other heads in training are none of its business.

    Raises ValueError.
    """
    if not isinstance(model, TimmNetwork):
        return
    _check_made(model)
    tried = copy.deepcopy(model)
    weights = next(tried.parameters(), torch.zeros(()))
    # Of every shade, of which a threshold or a clamp would change some.
    x = torch.linspace(0.0, 1.0, 12 * image_size**2, device=weights.device).to(dtype_of(tried))
    before = (x := x.view(4, 3, image_size, image_size)).clone()
    what = type(model.model).__name__
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            with eval_mode(tried):
                answers = [tried(x), tried(x), tried(x[:1])]  # of one, squeeze() leaves no row
            with torch.enable_grad(), _checkpoints() as reentrant:
                answers.append(tried.train(not evaluated)(x))
    except (AssertionError, RuntimeError, TypeError, AttributeError) as error:
        why = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        remedy = (
            f"choose data.image_size, or for timm's that have it model.timm_options={{img_size:{image_size}}}"
        )
        if "channels" in why:
            remedy = "pictures are RGB, (B, 3, H, W), and a network of grey ones makes them grey itself: x.mean(1, keepdim=True)"
        raise ValueError(
            f"{what} cannot take pictures of {image_size}x{image_size} ({why}); {remedy}"
        ) from error
    if not torch.equal(x, before):
        raise ValueError(
            f"{what} changes the pictures that it is given; leave out what works in place (mul_, sub_, relu_) at its beginning"
        )
    for answer, count in zip(answers, (4, 4, 1, 4), strict=True):
        if not isinstance(answer, Tensor) or answer.shape != (count, model.num_classes):
            raise ValueError(
                f"{what} returns {_got(answer)}; a network returns its logits alone, (B, {model.num_classes}) here"
            )
    logits, again, alone, _ = (answer.float() for answer in answers)
    largest = float(logits.abs().max())
    if float((logits - again).abs().max()) > 1e-5 * largest:
        raise ValueError(
            f"{what} draws at random in eval mode, so that no accuracy of it has a meaning; F.dropout needs training=self.training"
        )
    if float((logits[:1] - alone).abs().max()) > SAME * largest:
        raise ValueError(
            f"{what} answers a picture alone otherwise than in a batch, in eval mode: it normalises by the batch (train() of its own, or "
            "track_running_stats=False?)"
        )
    if bool((logits >= 0).all()) and bool(((logits.sum(-1) - 1).abs() < SAME).all()):
        raise ValueError(
            f"{what} returns probabilities; a network returns its logits: leave out the softmax at its end"
        )
    if trained:
        _check_backward(tried, what, reentrant)
    if attacked and not _has_gradient(tried, x):
        raise ValueError(
            f"{what} has no gradient to its pictures, which the attack climbs; leave out no_grad and detach in its forward"
        )


def _got(answer: Any) -> str:
    return f"shape {tuple(answer.shape)}" if isinstance(answer, Tensor) else f"a {type(answer).__name__}"


def _check_backward(model: nn.Module, what: str, reentrant: list[bool]) -> None:
    """Raises ValueError for a network whose backward pass computes what it should not. reentrant: see _checkpoints."""
    why = "computes its activations anew in the backward pass (torch.utils.checkpoint)"
    if True in reentrant:
        raise ValueError(
            f"{what} {why} with use_reentrant=True, which loses gradients here; set use_reentrant=False"
        )
    if reentrant and any(isinstance(m, _BatchNorm) for m in model.modules()):
        raise ValueError(
            f"{what} {why}, where its batch norm would count a batch twice and be in another mode; leave the checkpoints out; "
            "more devices save memory, too"
        )


@contextmanager
def _checkpoints() -> Iterator[list[bool]]:
    """Inside, whether each call of torch's activation checkpoints is a reentrant one."""
    found: list[bool] = []

    def heard(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_name == "checkpoint" and code.co_filename == checkpoint.__file__:
            found.append(frame.f_locals.get("use_reentrant") is not False)  # left out, it is one

    before = sys.getprofile()
    sys.setprofile(heard)
    try:
        yield found
    finally:
        sys.setprofile(before)


def _check_made(model: Any) -> None:
    """Raises ValueError for layers that have no weights until they see a picture."""
    lazy = [name for name, p in model.model.named_parameters() if isinstance(p, UninitializedParameter)]
    if lazy:
        raise ValueError(
            f"{type(model.model).__name__} has no weights yet for {lazy[0]} and others; give lazy layers their sizes, or end its __init__ "
            "with self(torch.zeros(2, 3, H, W))"
        )


def _has_gradient(model: nn.Module, x: Tensor) -> bool:
    with torch.enable_grad(), eval_mode(model):
        logits = model(x.requires_grad_())
        found = torch.autograd.grad(logits.sum(), x, allow_unused=True) if logits.requires_grad else (None,)
    return found[0] is not None
