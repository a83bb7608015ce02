"""Batch norm over all processes is batch norm of the whole batch: values, gradients, running statistics."""

from pathlib import Path

import torch
from torch import Tensor, nn

from gkl.distributed import rank
from gkl.models.batch_norm import frozen_statistics, ghost_batch_norm
from gkl.models.sync_batch_norm import SyncBatchNorm2d, synchronised
from tests.processes import on_processes


def network() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3)).double()
    nn.init.uniform_(made[1].weight, 0.5, 1.5)
    return made


def computed(model: nn.Module, x: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Two batches, the second with frozen statistics."""
    model.train()
    found = {"y": model(x).detach()}
    with frozen_statistics(model):
        y = model(x * 2 + 1)
    (y.square() * weights).sum().backward()
    found |= {f"grad.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {
        **found,
        **{name: b.clone() for name, b in model.named_buffers()},
        "eval": model.eval()(x).detach(),
    }


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return 5 + torch.randn(5, 2, 4, 3, dtype=torch.float64), torch.rand(5, 3, 4, 3, dtype=torch.float64)


def worker(folder: str) -> None:
    own = (slice(0, 2), slice(2, 5))[rank()]  # of other sizes
    found = computed(synchronised(network()), *(x[own] for x in batch()))
    torch.save(found, f"{folder}/{rank()}.pt")


def test_two_processes_are_one(tmp_path: Path) -> None:
    on_processes(worker, tmp_path, str(tmp_path))
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    whole = computed(network(), *batch())
    for name, wanted in whole.items():
        if name in ("y", "eval"):
            found = torch.cat([part[name] for part in parts])
        elif name.startswith("grad."):  # of shares, which the training adds up
            found = parts[0][name] + parts[1][name]
        else:
            found = parts[0][name]
            assert found.equal(parts[1][name])
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10, msg=name)


def test_alone_it_is_torch_s_to_the_bit_and_stays_whole_among_groups() -> None:
    one, other = network(), synchronised(network())
    assert isinstance(other[1], SyncBatchNorm2d)
    ghost_batch_norm(other, 4)
    assert isinstance(other[1], SyncBatchNorm2d)  # nothing to group
    found, wanted = computed(other, *batch()), computed(one, *batch())
    assert all(found[name].equal(wanted[name]) for name in wanted)
