"""A method is its algorithm: what a step computes with a batch, and what is measured. A training (trainers.loop.training) has one.

    @dataclass(kw_only=True)
    class Plain(Method):
        label_smoothing: float = 0.0

        def inputs(self, batch, epoch, step):
            return batch.images, batch.draws, batch.labels, batch.view

        def update(self, images, draws, y, view):
            x = self.see(images, view, draws)
            self.model.train()
            loss = F.cross_entropy(self.logits(x), y, reduction="sum") / self.items
            self.optimizer_step(loss)
            self.after_step()
            return {"loss": loss}

Its fields are its settings: plain values come from the `method` section of a configuration, objects from sections of their names.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from gkl.data.batches import Batch
from gkl.data.few_labels import FewLabels
from gkl.models.batch_norm import eval_mode
from trainers.loop.compute import compiled
from trainers.loop.console import Console

if TYPE_CHECKING:
    from trainers.loop.training import Training


class Method(ABC):
    """Base of all methods."""

    training: "Training"
    views_together: ClassVar[bool] = False  # whether a process gets all views of its samples
    reads_every_label: ClassVar[bool] = True  # of its training pictures
    classifies: ClassVar[bool] = True  # whether its network gives pictures classes, which assessments measure
    takes_turns: ClassVar[bool] = False  # whether a process can take its part of a batch in micro-batches
    groups_reach_over_devices: ClassVar[bool] = (
        False  # whether several may share a batch-norm group: no loss of it is of a group's pictures
    )
    keeps_best: ClassVar[bool] = (
        False  # whether its weights have `best` without being told which epoch that is
    )

    # --- the algorithm ------------------------------------------------------------------------------------------------

    def bind(self, training: "Training") -> None:
        """Told once whose method it is, before the optimizer is made: make further networks here.

        Raises ValueError for data that it would read more labels of than there are, and for micro-batches that it does not take.
        """
        self.training = training
        if training.setup.accumulate > 1 and not self.takes_turns:
            raise ValueError(
                f"accumulate={training.setup.accumulate} has no effect on {type(self).__name__}, which takes a process's part of a batch at "
                "once; set accumulate=1, and use more devices where memory is short"
            )
        if self.reads_every_label and isinstance(data := training.data, FewLabels):
            raise ValueError(
                f"{type(self).__name__} would train on the labels of all {len(data.train_labels):,} pictures of {data.name}, and not on "
                f"{len(data.labelled):,} alone; choose the whole set, or data=image_folder data.train_per_class={len(data.labelled) // data.num_classes}"
            )

    @abstractmethod
    def inputs(self, batch: Batch, epoch: int, step: int) -> tuple[Tensor | None, ...]:
        """What an update computes with, on the device: of equal shapes but for the last step's."""

    @abstractmethod
    def update(self, *inputs: Any) -> dict[str, Tensor]:
        """One update from `inputs`; returns this process's shares of what is logged, whose sum over processes is the value.

        On a GPU it is recorded and replayed: of epoch and step it may use what `constants` tells, and self.samples, self.items and
        self.first_step. Every loss is this process's share of the mean over the global batch.
        """

    def steps_in(self, epoch: int) -> int:
        """Steps of an epoch."""
        return self.training.batches.steps_per_epoch

    def span(self, epoch: int) -> tuple[int, int]:
        """First and last epoch of what a schedule by step runs over, once."""
        return 1, self.training.epochs

    def constants(self, epoch: int) -> tuple[Any, ...]:
        """Numbers of an epoch that an update holds and Python keeps: one recording serves the epochs that agree in them."""
        return ()

    def unrecordable(self) -> str | None:
        """Why updates cannot be recorded as CUDA graphs, None if they can."""
        return None

    @staticmethod
    @abstractmethod
    def forwards(config: Mapping[str, Any], epoch: int, steps: int) -> dict[str, float]:
        """Forward-equivalents a training image costs in an epoch of `steps` attack steps, by network of the configuration.

        A forward counts 1, a backward to the image 1, to image and parameters 2.
        """

    @abstractmethod
    def epoch_metrics(self, epoch: int) -> dict[str, float]:
        """What is measured after an epoch, for its line of the history."""

    @abstractmethod
    def evaluate(
        self, *, headline: str, settings: Mapping[str, Any], folder: Path, console: Console
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Final metrics in percent and their details. headline: whose weights give the run's numbers.

        settings: the configs/evaluation file; empty where there is none.
        """

    # --- its networks and what it keeps -------------------------------------------------------------------------------

    def adapt(self, model: nn.Module) -> nn.Module:
        """The model as the method wants it, before it is placed."""
        return model

    def compiled(self, model: nn.Module) -> Any:
        """What `logits` calls in the model's place where networks are compiled."""
        return compiled(model)

    def trained_module(self) -> nn.Module:
        """What the optimizer changes."""
        return self.model

    def networks(self) -> Iterable[nn.Module]:
        """The networks whose batch norm follows the batch."""
        return (self.model,)

    def start_epoch(self, epoch: int) -> None:  # noqa: B027  (an optional hook)
        """Before the first step."""

    def end_epoch(self) -> None:  # noqa: B027
        """After the last step."""

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """Weights a run ends with beside the last and the averages', as state dicts by name."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The method's part of a checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Inverse of state_dict."""

    def describe(self, batch: Batch) -> dict[str, Any]:
        """What is needed to look at a batch again: sample numbers, images as they were seen, the logits they give now."""
        images, draws, labels, view, index = batch
        x = self.see(images, view, draws)
        with torch.no_grad(), eval_mode(self.model):
            logits = self.logits(x.flatten(0, -4))
        return {"index": index, "view": view, "labels": labels, "images": x, "logits": logits}

    def origins(self) -> dict[str, Any]:
        """What a record must say of where the method's ingredients come from, beside the data."""
        return {}

    # --- words for the algorithm --------------------------------------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        """The network that the training is for."""
        return self.training.model

    @property
    def device(self) -> torch.device:
        """Where everything computes."""
        return self.training.compute.device

    @property
    def dtype(self) -> torch.dtype:
        """Of losses: float32, in tests float64."""
        return self.training.compute.dtype

    @property
    def epoch(self) -> int:
        """The epoch, 1, 2, ..."""
        return self.training.epoch

    @property
    def samples(self) -> int:
        """Samples of the global batch."""
        return self.training.samples

    @property
    def items(self) -> int:
        """Samples of the global batch times the views of each."""
        return self.training.samples * len(self.training.batches.augment.views)

    def logits(self, x: Tensor, network: nn.Module | None = None) -> Tensor:
        """(b, C) of a network, the model unless told, in float32 or better."""
        return self.training.compute.logits(self.training.network if network is None else network, x)

    def see(self, images: Tensor, view: Tensor, draws: Tensor) -> Tensor:
        """The views (b, 3, H, W) in [0, 1] of pictures as a batch holds them."""
        return self.training.see(images, view, draws)

    def optimizer_step(
        self, loss: Tensor | Iterable[Tensor], optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        """A step on the sum of all processes' shares of the loss, or of its parts, each carried back before the next is computed."""
        self.training.optimizer_step(loss, optimizer)

    def after_step(self) -> None:
        """Batch norm's buffers and the averages follow an update."""
        self.training.after_step()
