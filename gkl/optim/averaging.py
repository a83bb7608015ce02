"""Weight averages kept as training goes, in place of a folder of 200 checkpoints.

swa = Average(decay=0.9, every="epoch")
for epoch in range(1, epochs + 1):
    for batch in loader:
        step(batch); swa.after_step(model, epoch)
    swa.after_epoch(model, epoch)
evaluate_at(swa.state)
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn


class Average:
    """Exponential average of parameters and float buffers: a <- decay * a + (1 - decay) * w from `start_epoch` on.

    Batch-norm running statistics are averaged with the weights and not estimated anew, as the authors' swa.py does;
    integer buffers are copied. In `start_epoch` the average is a copy of the model; from 0 on it begins with the initial weights.
    every: "epoch" (their average over the files of epochs 1..200 has decay 0.9) or "step" (their EMA: 0.9996).
    """

    recordable = True  # whether `after_step` is the same work at every step of one `phase`

    def __init__(self, decay: float, every: Literal["epoch", "step"], start_epoch: int = 1) -> None:
        if not 0.0 <= decay < 1.0 or every not in ("epoch", "step"):
            raise ValueError(
                f"an average needs decay in [0, 1) and every=epoch|step, got {decay} and {every!r}"
            )
        self.decay, self.every, self.start_epoch = decay, every, start_epoch
        self.state: dict[str, Tensor] = {}

    def prepare(self, steps: int, model: nn.Module) -> None:
        """Told once how many steps the training has, and the model as it begins."""
        if self.start_epoch == 0:
            self.state = {key: value.detach().clone() for key, value in model.state_dict().items()}

    def phase(self, epoch: int) -> int:
        """What after_step does in an epoch: -1 nothing, 0 a copy, 1 the average."""
        return -1 if self.every != "step" else (epoch > self.start_epoch) - (epoch < self.start_epoch)

    def after_step(self, model: nn.Module, epoch: int) -> None:
        """Call after every optimizer step of epoch 1, 2, ..."""
        if self.every == "step":
            self._update(model, epoch)

    def after_epoch(self, model: nn.Module, epoch: int) -> None:
        """Call after the last step of epoch 1, 2, ..."""
        if self.every == "epoch":
            self._update(model, epoch)

    @torch.no_grad()
    def _update(self, model: nn.Module, epoch: int) -> None:
        if epoch < self.start_epoch:
            return
        state = model.state_dict()
        if not self.state:
            self.state = {key: value.detach().clone() for key, value in state.items()}
            return
        if epoch == self.start_epoch:
            torch._foreach_copy_(list(self.state.values()), [state[key] for key in self.state])
            return
        averaged = [key for key, value in state.items() if value.is_floating_point()]
        torch._foreach_lerp_(
            [self.state[key] for key in averaged], [state[key] for key in averaged], 1.0 - self.decay
        )
        for key, value in state.items():
            if not value.is_floating_point():
                self.state[key].copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return {"state": self.state}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from a checkpoint's average."""
        self.state = {key: value.to(device) for key, value in state["state"].items()}


@contextmanager
def swapped(model: nn.Module, state: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the model's parameters are those of a state."""
    own = {name: parameter.data for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.data = state[name]
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.data = own[name]


class RampedAverage(Average):
    """The average of DM-AT: parameters alone, its decay rising with the steps taken after a warm-up.

    Until `warmup` of all steps it is the model; t steps later its decay is min(decay, (1 + t) / (10 + t)). Batch-norm
    statistics are the model's at the end of each epoch. Source: Gowal et al. 2020, as DM-AT's trainer has it.
    """

    recordable = False  # another decay at every step

    def __init__(self, decay: float, warmup: float = 0.025) -> None:
        """warmup: share of all steps."""
        super().__init__(decay, every="step")
        self.warmup, self.steps, self.taken = warmup, 0, 0

    def prepare(self, steps: int, model: nn.Module) -> None:
        """Told once how many steps the training has."""
        self.steps = steps

    @torch.no_grad()
    def after_step(self, model: nn.Module, epoch: int) -> None:
        """Call after every optimizer step."""
        self.taken += 1
        since = self.taken - self.warmup * self.steps
        decay = min(self.decay, (1.0 + since) / (10.0 + since)) if since >= 0 else 0.0
        if not self.state:
            self.state = {key: value.detach().clone() for key, value in model.state_dict().items()}
        parameters = dict(model.named_parameters())
        torch._foreach_lerp_(
            [self.state[name] for name in parameters], list(parameters.values()), 1.0 - decay
        )

    @torch.no_grad()
    def after_epoch(self, model: nn.Module, epoch: int) -> None:
        """Call after the last step of each epoch."""
        for name, value in model.named_buffers():
            if name in self.state:
                self.state[name].copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return {"state": self.state, "taken": self.taken}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from a checkpoint's average."""
        super().load_state_dict(state, device)
        self.taken = state["taken"]
