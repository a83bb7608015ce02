"""Adversarial training with a loss between clean and adversarial view: TRADES+AWP (KL) and GKL-AT are its settings.

A step reads like the paper's: attack, perturb the weights, both views forward, backward, step, restore.
Source: arXiv 2503.08038 Sec. 4.1; order of things as in the authors' training script.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkl.attacks import PGD, pgd
from gkl.augment import Views, to_float
from gkl.averaging import Average
from gkl.awp import perturbed
from gkl.counter import normal, sample_keys
from gkl.data import ImageData
from gkl.distributed import broadcast_, rank, world_size, world_sum_
from gkl.models.batch_norm import eval_mode, frozen_statistics, group_batch_norm, set_group_size
from gkl.objectives import Objective
from gkl.prior import ClassPrior
from trainers.report import Console
from trainers.robustness import autoattack, clean_accuracy

Precision = Literal["float32", "tf32", "bf16", "float64"]


class AdversarialTraining:
    """CE(clean) + loss(adversarial || clean), with AWP, class prior and weight averages. A `trainers.engine.Task`."""

    def __init__(
        self,
        *,
        data: ImageData,
        model: nn.Module,
        loss: Objective,
        attack: PGD,
        attack_loss: Objective,
        prior: Callable[..., ClassPrior],
        augment: Views,
        optimizer: Callable[..., torch.optim.Optimizer],
        schedule: Callable[[int, int], float],
        averages: Mapping[str, Average],
        awp_gamma: float,
        awp_start_epoch: int,
        view_weights: Sequence[float],
        seed: int,
        epochs: int,
        batch_size: int,
        drop_last: bool,
        bn_groups: int,
        precision: Precision,
        channels_last: bool,
        compile: bool,
        device: torch.device,
    ) -> None:
        """model: takes images in [0, 1]. view_weights: weight of `loss` on each of augment's views.

        awp_gamma: 0 trains without AWP. bn_groups: batch norm sees the batch in so many parts (4 cards: 4).
        precision: of the network alone; losses, attack steps and averages are float32 (float64 in tests).
        """
        if len(view_weights) != len(augment.views):
            raise ValueError(
                f"method.view_weights needs one weight per view, got {list(view_weights)} for {list(augment.views)}"
            )
        self.dtype = torch.float64 if precision == "float64" else torch.float32
        if device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
            torch.backends.cudnn.deterministic = True
        self.data, self.device, self.precision = data, device, precision
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.model, self.bn_groups = group_batch_norm(model, bn_groups), bn_groups
        self.model.to(device, self.dtype).to(memory_format=self.memory_format)
        self.network = torch.compile(self.model) if compile else self.model
        self.loss, self.attack, self.attack_loss, self.augment = loss, attack, attack_loss, augment
        self.prior = prior(num_classes=data.num_classes).to(device=device)
        self.prior.probs = self.prior.probs.to(self.dtype)
        self.optimizer, self.schedule = optimizer(self.model), schedule
        self.base_lr = self.optimizer.param_groups[0]["lr"]
        self.averages = averages
        self.awp_gamma, self.awp_start_epoch = awp_gamma, awp_start_epoch
        self.view_weights = torch.tensor(view_weights, device=device, dtype=self.dtype)
        self.seed, self.epochs, self.batch_size = seed, epochs, batch_size
        full, rest = divmod(len(data.train_labels), batch_size)
        self.steps_per_epoch = full + (1 if rest and not drop_last else 0)
        self.images, self.labels = data.train_images.to(device), data.train_labels.to(device)

    def logits(self, x: Tensor) -> Tensor:
        """Network output in float32 or better, whatever precision the network computes in."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.network(x.contiguous(memory_format=self.memory_format)).to(self.dtype)

    def start_epoch(self, epoch: int) -> None:
        """Learning rate, attack budget and order of the samples."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.base_lr * self.schedule(epoch, self.epochs)
        self.budget = self.attack.budget(epoch, self.epochs)
        generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
        self.order = torch.randperm(len(self.labels), generator=generator)

    def batch(self, epoch: int, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """This process's part of a step: images (b, 3, H, W) in [0, 1], labels, view numbers, sample indices (b,).

        The batch's views stand one after the other and are cut into contiguous parts, as DataParallel scatters them.
        """
        index = self.order[step * self.batch_size : (step + 1) * self.batch_size]
        views = len(self.view_weights)
        items = torch.arange(views * len(index))
        group_size = math.ceil(len(items) / self.bn_groups)
        set_group_size(self.model, group_size)
        share = self.bn_groups // world_size()  # batch-norm groups a process holds
        item = torch.cat(items.split(group_size)[rank() * share : (rank() + 1) * share])
        view, index = item // len(index), index[item % len(index)]
        view, index = view.to(self.device), index.to(self.device)
        pictures = self.augment(self.images[index], seed=self.seed, epoch=epoch, index=index)
        x = torch.stack(pictures)[view, torch.arange(len(index), device=self.device)]
        return to_float(x).to(self.dtype), self.labels[index], view, index

    def train_step(self, epoch: int, step: int) -> dict[str, Tensor]:
        """One update; every loss is this process's share of the mean over the global batch of all views."""
        x, y, view, index = self.batch(epoch, step)
        batch = min(self.batch_size, len(self.labels) - step * self.batch_size)  # samples over all processes
        items = batch * len(self.view_weights)

        with eval_mode(self.model):
            with torch.no_grad():
                reference = self.logits(x)  # constant during the attack: the reference point does not move
            keys = sample_keys(self.seed, epoch, index, "attack_start") + view
            x_adv = pgd(
                self.logits,
                x,
                lambda logits: self.attack_loss(logits, reference, y, self.prior),
                norm=self.attack.norm,
                start=x + self.attack.start_std * normal(keys, tuple(x.shape[1:]), self.dtype),
                **self.budget,
            )

        self.model.train()

        def worst_case() -> Tensor:
            with frozen_statistics(self.model):
                clean, adversarial = self.logits(x), self.logits(x_adv)
            robust = self.loss(adversarial, clean, y, self.prior)
            return (F.cross_entropy(clean, y, reduction="sum") + robust.sum()) / items

        weights: AbstractContextManager[None] = nullcontext()
        if self.awp_gamma > 0 and epoch >= self.awp_start_epoch:
            weights = perturbed(self.model, worst_case, self.awp_gamma)
        with weights:
            adversarial, clean = self.logits(x_adv), self.logits(x)
            natural = F.cross_entropy(clean, y, reduction="sum") / items
            robust = (self.view_weights[view] * self.loss(adversarial, clean, y, self.prior)).sum() / batch
            self.optimizer.zero_grad(set_to_none=True)
            (natural + robust).backward()
            world_sum_(p.grad for p in self.model.parameters() if p.grad is not None)
            self.optimizer.step()

        broadcast_(self.model.buffers())  # process 0 holds the batch-norm statistics that count
        basic = view == 0
        self.prior.update(clean.detach()[basic], y[basic])
        for average in self.averages.values():
            average.after_step(self.model, epoch)
        correct = (adversarial.detach().argmax(-1) == y).sum() * (100.0 / items)
        return {"loss/natural": natural, "loss/robust": robust, "train/robust_accuracy": correct}

    def end_epoch(self, epoch: int) -> dict[str, float]:
        """Renew the prior, average the weights, measure clean test accuracy."""
        self.prior.renew()
        for average in self.averages.values():
            average.after_epoch(self.model, epoch)
        return {
            "lr": self.optimizer.param_groups[0]["lr"],
            "epsilon": self.budget["epsilon"],
            "test/clean": clean_accuracy(self.model, self.data, self.device),
        }

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """The networks a run ends with, as state dicts: `last` and each average by its name."""
        last = {key: value.clone() for key, value in self.model.state_dict().items()}
        return {"last": last, **{name: a.state for name, a in self.averages.items() if a.state}}

    def evaluate(
        self, *, headline: str, settings: Mapping[str, Any], folder: Path, console: Console
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Final metrics in percent and their details: clean accuracy of all weights, the attack on the headline's."""
        metrics = {}
        for name, state in sorted(
            self.weights().items(), key=lambda item: item[0] == headline
        ):  # the headline last
            self.model.load_state_dict(state)
            metrics["clean" if name == headline else f"clean_{name}"] = clean_accuracy(
                self.model, self.data, self.device
            )
        robust, details = autoattack(
            self.model.float(),
            self.data,
            settings,
            folder=folder / "autoattack",
            device=self.device,
            console=console,
        )
        return {**metrics, **robust}, {"weights": headline, **details}

    def state_dict(self) -> dict[str, Any]:
        """Everything the next step depends on; the processes' running sums of the prior are brought together."""
        self.prior.merge()
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "prior": self.prior.state_dict(),
            "averages": {name: average.state_dict() for name, average in self.averages.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint, on any number of processes."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.prior.load_state_dict(state["prior"])
        if rank() != 0:  # the checkpoint's running sums are those of all processes
            self.prior.sums.zero_()
            self.prior.counts.zero_()
        for name, average in self.averages.items():
            average.load_state_dict(state["averages"][name], self.device)

    def describe_batch(self, epoch: int, step: int) -> dict[str, Any]:
        """The sample indices of a step, its images as they were seen, and the logits they give now."""
        x, y, view, index = self.batch(epoch, step)
        with torch.no_grad(), eval_mode(self.model):
            return {"index": index, "view": view, "labels": y, "images": x, "logits": self.logits(x)}
