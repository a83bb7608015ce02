"""A network that learns from pictures without labels: it restores what was hidden and blurred by noise (Vincent et al. 2008).

loss = mean over pixels of (decoder(f(x * keep + noise)) - x)^2, with whole patches hidden (He et al. 2022). It stands in for published
pretrained weights where a scale has none.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkl.data.augment import to_float
from gkl.data.batches import Batch
from gkl.rng import normal, sample_keys, uniform
from trainers.loop.accuracy import eval_batch_size
from trainers.loop.console import Console
from trainers.loop.method import Method
from trainers.loop.training import Training


@dataclass(kw_only=True)
class Denoising(Method):
    """hidden: share of the patches that the network does not see. noise: standard deviation, pixels are in [0, 1]."""

    hidden: float
    noise: float
    reads_every_label: ClassVar[bool] = False  # none
    classifies: ClassVar[bool] = False

    def bind(self, training: Training) -> None:
        """The decoder, one layer from a token to its patch. Raises ValueError for a network without tokens."""
        super().bind(training)
        transformer: Any = getattr(self.model, "model", None)
        if not hasattr(transformer, "patch_embed"):
            raise ValueError(
                f"denoising needs a vision transformer (vit_...), got {type(self.model).__name__}"
            )
        self.patch = int(transformer.patch_embed.patch_size[0])
        self.side = training.data.image_size // self.patch
        self.decoder = training.compute.to_device(nn.Linear(transformer.embed_dim, 3 * self.patch**2))

    def trained_module(self) -> nn.Module:
        """The network and its decoder."""
        return nn.ModuleList([self.model, self.decoder])

    def inputs(self, batch: Batch, epoch: int, step: int) -> tuple[Tensor, ...]:
        """Pictures, and what hides and blurs them."""
        keys = sample_keys(self.training.seed, epoch, batch.sample, "denoising")
        keys = keys.to(self.device, non_blocking=True)
        return batch.images, batch.draws, batch.view, keys

    def update(self, images: Tensor, draws: Tensor, view: Tensor, keys: Tensor) -> dict[str, Tensor]:
        """One update; the loss is this process's share of the mean over the global batch."""
        x = self.see(images, view, draws)  # (b, 3, H, W)
        self.model.train()
        loss = self.errors(x, keys).sum() / self.items
        self.optimizer_step(loss)
        self.after_step()
        return {"loss/restored": loss.detach()}

    def errors(self, x: Tensor, keys: Tensor) -> Tensor:
        """Mean square error of each restored picture, (b,)."""
        network: Any = self.model
        keep = (uniform(keys, self.side**2) >= self.hidden).to(x.dtype).view(-1, 1, self.side, self.side)
        seen = x * F.interpolate(keep, scale_factor=float(self.patch)) + self.noise * normal(
            keys + 1, x.shape[1:], x.dtype
        )
        tokens = network.forward_features(seen)[:, 1:]  # (b, N, D), without the class token
        restored = F.pixel_shuffle(
            self.decoder(tokens).transpose(1, 2).unflatten(2, (self.side, self.side)), self.patch
        )
        return (restored - x).square().flatten(1).mean(1)

    def epoch_metrics(self, epoch: int) -> dict[str, float]:
        """Share of the test pictures' variance that is restored, percent."""
        return {"test/restored": self.restored()}

    def restored(self) -> float:
        """100 (1 - error / variance), from 0 on, with the same noise each time."""
        data: Any = self.training.data
        total, count = 0.0, 0
        self.model.eval()
        pictures = to_float(data.test_images).to(self.dtype)
        with torch.no_grad():
            for number in torch.arange(len(pictures)).split(eval_batch_size(self.device)):
                keys = sample_keys(0, 0, number, "denoising").to(self.device)
                total += self.errors(pictures[number].to(self.device), keys).sum().item()
                count += len(number)
        return max(0.0, 100.0 * (1.0 - total / count / pictures.var().item()))

    def evaluate(
        self, *, headline: str, settings: Mapping[str, Any], folder: Path, console: Console
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """`restored`."""
        return {"restored": self.restored()}, {"weights": headline}

    @staticmethod
    def forwards(config: Mapping[str, Any], epoch: int, steps: int) -> dict[str, float]:
        """A step."""
        return {"model": 3.0}

    def state_dict(self) -> dict[str, Any]:
        """The decoder."""
        return {"decoder": self.decoder.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of state_dict."""
        self.decoder.load_state_dict(state["decoder"])
