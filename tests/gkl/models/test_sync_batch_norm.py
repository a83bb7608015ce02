"""Batch norm over all processes is batch norm of the whole batch, or of its groups: values, gradients, running statistics."""

from pathlib import Path

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from gkl.distributed import Shard, rank, world_size
from gkl.models.batch_norm import (
    auxiliary_batch_norm,
    frozen_statistics,
    ghost_batch_norm,
    set_group_size,
    split_batch_norm,
)
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


NORMS = {
    "plain": lambda: nn.BatchNorm2d(3),
    "average of all batches": lambda: nn.BatchNorm2d(3, momentum=None),
    "no weights": lambda: nn.BatchNorm2d(3, affine=False),
    "no statistics": lambda: nn.BatchNorm2d(3, track_running_stats=False),
    "timm": lambda: BatchNormAct2d(3, act_layer=nn.GELU),
    "split": lambda: nn.BatchNorm2d(3),
    "of rows": lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(36)),
}


def grouped(name: str, groups: int, across: bool, own: Tensor) -> dict[str, Tensor]:
    """Two training batches, one with the second set where there are two, one in eval mode. own: what of each is this process's."""
    torch.manual_seed(0)
    norm = NORMS[name]().double()
    for p in norm.parameters():
        nn.init.uniform_(p, 0.5, 1.5)
    model = split_batch_norm(nn.Sequential(norm)) if name == "split" else nn.Sequential(norm)
    model = ghost_batch_norm(model, groups, across)
    x = torch.randn(ITEMS, 3, 4, 3, dtype=torch.float64) * 3 + torch.arange(ITEMS).view(-1, 1, 1, 1)
    set_group_size(model, Shard(groups).group_size(ITEMS))
    weights = torch.rand(ITEMS, 3, 4, 3, dtype=torch.float64)[own]
    mine = x[own].requires_grad_()
    y = model(mine)
    with auxiliary_batch_norm(model):
        z = model(mine.square())
    ((y.square() + z.sin()).view_as(mine) * weights).sum().backward()
    assert mine.grad is not None
    found = {"cat.y": y.detach(), "cat.x": mine.grad, "cat.eval": model.eval()(mine).detach()}
    found |= {f"sum.{n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return found | {n: b.clone() for n, b in model.named_buffers()}


ITEMS = 11


def sharing(folder: str, groups: int) -> None:
    shard = Shard(groups)
    assert shard.among == world_size() // groups and shard.reaches_all(ITEMS)
    found = {name: grouped(name, groups, True, shard.mine(ITEMS)) for name in NORMS}
    torch.save({"mine": shard.mine(ITEMS), **found}, f"{folder}/{rank()}.pt")


@pytest.mark.parametrize(("count", "groups"), [(2, 1), (4, 2)])
def test_processes_that_share_groups_are_one(count: int, groups: int, tmp_path: Path) -> None:
    on_processes(sharing, tmp_path, str(tmp_path), groups, count=count)
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(count)]
    assert torch.equal(torch.cat([part["mine"] for part in parts]), torch.arange(ITEMS))
    for name in NORMS:
        for key, wanted in grouped(name, groups, False, torch.arange(ITEMS)).items():
            each = [part[name][key] for part in parts]
            if key.startswith("cat."):
                found = torch.cat(each)
            elif key.startswith("sum."):
                found = torch.stack(each).sum(0)
            else:
                found = each[0]
                assert all(found.equal(other) for other in each)
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10, msg=f"{name}, {key}")
