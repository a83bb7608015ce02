"""The prior and GKLLoss as parts of someone's module: what trainers do to modules changes none of their numbers."""

import copy
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from gkl import ClassPrior, GKLLoss, gkl_loss
from tests.processes import on_processes

SETTINGS = {"alpha": 20.0, "beta": 4.0, "gamma": 0.4}
HALF = [torch.float16, torch.bfloat16]


class Model(nn.Module):
    """Someone's: a network with its criterion inside, or with a prior alone."""

    def __init__(self, form: str = "criterion") -> None:
        super().__init__()
        self.net = nn.Linear(6, 5)
        self.held = GKLLoss(5, **SETTINGS) if form == "criterion" else ClassPrior(5)

    @property
    def prior(self) -> ClassPrior:
        return self.held.prior if isinstance(self.held, GKLLoss) else self.held

    def forward(self, x: Tensor, moved: Tensor, y: Tensor) -> Tensor:
        clean, adversarial = self.net(x), self.net(moved)
        if isinstance(self.held, GKLLoss):
            return self.held(adversarial, clean, y)
        loss = gkl_loss(adversarial, clean, self.held.at(y), **SETTINGS)
        self.held.update(clean, y)
        return loss


def batch(seed: int = 0, size: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 6, generator=draw)
    return x, x + 0.3 * torch.randn(size, 6, generator=draw), torch.randint(5, (size,), generator=draw)


def trained(model: Model, seed: int = 0) -> Model:
    """A whole epoch and half of another behind it, so that probs, sums and counts all tell something."""
    model(*batch(seed))
    model.prior.renew()
    model(*batch(seed + 1))
    return model


def numbers(prior: ClassPrior) -> list[Tensor]:
    return [prior.probs, prior.sums, prior.counts]


def assert_whole(prior: ClassPrior, expected: list[Tensor]) -> None:
    """The same numbers to the bit, a table that fits them, and an epoch that goes on."""
    for mine, theirs in zip(numbers(prior), expected, strict=True):
        assert mine.dtype == theirs.dtype and mine.equal(theirs)
    y = torch.arange(5)
    torch.testing.assert_close(prior.rows(y, 0.4), prior.probs**0.4)
    torch.testing.assert_close(prior.totals(y, 0.4), (prior.probs**0.4).sum(1))
    sums = prior.sums.clone()
    prior.update(torch.zeros(5, 5), y)
    assert prior.sums.dtype == torch.float64
    torch.testing.assert_close(prior.sums, sums + 0.2, rtol=1e-6, atol=0)
    prior.renew()
    torch.testing.assert_close(prior.rows(y, 0.4), prior.probs**0.4)


def saved(model: Model, assign: bool) -> Model:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = trained(Model("criterion" if isinstance(model.held, GKLLoss) else "prior"), 7)
    state = torch.load(file, weights_only=True)
    other.load_state_dict(state, strict=True, assign=assign)
    return other


def pickled(model: Model) -> Model:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_distributed_checkpoint(model: Model) -> Model:
    other = trained(Model("criterion" if isinstance(model.held, GKLLoss) else "prior"), 7)
    set_model_state_dict(other, get_model_state_dict(model))
    return other


def by_way_of_meta(model: Model, assign: bool = False) -> Model:
    """As large models are built: without values, then with memory, then loaded; or loaded by what is there."""
    with torch.device("meta"):
        other = Model("criterion" if isinstance(model.held, GKLLoss) else "prior")
    if not assign:
        other.to_empty(device="cpu")
        assert other.prior.probs.equal(torch.full((5, 5), 0.2)) and other.prior.counts.sum() == 0
    other.load_state_dict(model.state_dict(), assign=assign)
    return other


WAYS: dict[str, Callable[[Model], Model]] = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "to(float16)": lambda m: m.to(torch.float16),
    "to(device, dtype)": lambda m: m.to("cpu", torch.bfloat16),
    "half and back": lambda m: m.half().float(),
    "type": lambda m: m.type(torch.float16),
    "float8": lambda m: m.to(torch.float8_e4m3fn),
    "complex": lambda m: m.to(torch.complex64),
    "share_memory": lambda m: m.share_memory(),
    "to_empty": lambda m: (m.prior.to_empty(device="cpu"), m)[1],
    "deepcopy": copy.deepcopy,
    "deepcopy of half": lambda m: copy.deepcopy(m.half()),
    "pickled whole": pickled,
    "saved and loaded": lambda m: saved(m, assign=False),
    "saved and assigned": lambda m: saved(m, assign=True),
    "distributed checkpoint": by_distributed_checkpoint,
    "meta": by_way_of_meta,
    "meta, assigned": lambda m: by_way_of_meta(m, assign=True),
    "SyncBatchNorm": nn.SyncBatchNorm.convert_sync_batchnorm,
    "eval and train": lambda m: m.eval().train(),
    "requires_grad_": lambda m: m.requires_grad_(False).requires_grad_(True),
    "zero_grad": lambda m: (m.zero_grad(), m)[1],
}  # fmt: skip


@pytest.mark.parametrize("form", ["criterion", "prior"])
@pytest.mark.parametrize("way", WAYS)
def test_what_is_done_to_a_module_leaves_its_prior(way: str, form: str) -> None:
    model = trained(Model(form))
    expected = [x.clone() for x in numbers(model.prior)]
    assert expected[0].std() > 0.01 and expected[2].sum() == 12
    assert_whole(WAYS[way](model).prior, expected)


def test_double_widens_probs_and_half_does_not_take_it_back() -> None:
    model = trained(Model())
    expected = [x.double() for x in numbers(model.prior)]
    assert_whole(copy.deepcopy(model).double().prior, expected)
    assert_whole(model.double().half().prior, expected)
    assert model.net.weight.dtype == torch.float16 and model.prior.probs.dtype == torch.float64
    assert model.float().prior.probs.dtype == torch.float32 and model.prior.sums.dtype == torch.float64


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_saved_in_half_loads_into_float64_sums_and_belongs_to_no_one_else(assign: bool) -> None:
    model = trained(Model())
    state = {k: v.half() for k, v in model.state_dict().items()}
    kept = copy.deepcopy(state)
    other = Model()
    other.load_state_dict(state, assign=assign)
    assert_whole(other.prior, [x.half().to(x.dtype) for x in numbers(model.prior)])
    assert all(state[k].equal(kept[k]) for k in state if k != "held.prior.probs")


def test_a_state_lacking_or_with_more_is_told_by_name() -> None:
    state = trained(Model()).state_dict()
    assert [k for k in state if "prior" in k] == [f"held.prior.{n}" for n in ("probs", "sums", "counts")]
    lacking = {k: v for k, v in state.items() if k != "held.prior.sums"}
    with pytest.raises(RuntimeError, match=r"Missing key.*held\.prior\.sums"):
        Model().load_state_dict(lacking)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*held\.prior\.more"):
        Model().load_state_dict(state | {"held.prior.more": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="size mismatch for held.prior.sums"):
        Model().load_state_dict(state | {"held.prior.sums": torch.zeros(4, 4)})
    found = Model().load_state_dict(lacking, strict=False)
    assert found.missing_keys == ["held.prior.sums"] and not found.unexpected_keys


def test_moved_to_another_device_everything_goes_along() -> None:
    """To a device without values, and on: what is computed there lies there."""
    model = trained(Model())
    model.to("meta")
    assert {x.device.type for x in numbers(model.prior)} == {"meta"}
    y = torch.empty(4, dtype=torch.int64, device="meta")
    assert model.prior.rows(y, 0.4).device.type == "meta" and model.prior.totals(y, 0.4).device.type == "meta"
    model.prior.update(torch.empty(4, 5, device="meta"), y)
    model.prior.renew()
    # Buffer by buffer, as FSDP moves: the sums follow at the next update.
    prior = ClassPrior(5)
    prior.probs = prior.probs.to("meta")
    prior.update(torch.empty(4, 5, device="meta"), y)
    assert {x.device.type for x in numbers(prior)} == {"meta"}


@pytest.mark.parametrize("gamma", [0.4, 1.0])
def test_probs_that_someone_rounds_are_read_in_float32(gamma: float) -> None:
    """As FSDP's buffer_dtype does it: the weights are what bfloat16 holds of them, and all else is as precise as ever."""
    model = trained(Model())
    one, other = model.prior, copy.deepcopy(model.prior)
    y = torch.arange(5)
    before = one.rows(y, gamma).clone()
    one.probs = one.probs.bfloat16()
    assert one.rows(y, gamma).dtype == one.totals(y, gamma).dtype == torch.float32
    torch.testing.assert_close(one.rows(y, gamma), one.probs.float() ** gamma)
    torch.testing.assert_close(before, other.rows(y, gamma), rtol=0, atol=0)
    for prior in (one, other):
        prior.update(torch.randn(5, 5, generator=torch.Generator().manual_seed(0)), y)
    assert one.sums.equal(other.sums)


def test_a_replica_of_data_parallel_adds_to_the_module_s_sums() -> None:
    model = Model()
    replica = model.prior._replicate_for_data_parallel()
    replica._buffers["probs"] = model.prior.probs.clone()
    replica.update(torch.zeros(5, 5), torch.arange(5))
    assert model.prior.counts.sum() == 5


class Kept:
    """Averages of a network as people write them. Each writes into the copy's buffers, which then fit its tables no more."""

    @staticmethod
    def swa(average: Model, model: Model) -> None:
        whole = AveragedModel(model, use_buffers=True)
        whole.module = average
        whole.n_averaged.fill_(1)
        whole.update_parameters(model)

    @staticmethod
    def buffers(average: Model, model: Model) -> None:
        for mine, theirs in zip(average.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)

    @staticmethod
    def state(average: Model, model: Model) -> None:
        for mine, theirs in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
            mine.mul_(0.9).add_(theirs, alpha=0.1)

    @staticmethod
    def assigned(average: Model, model: Model) -> None:
        average.prior.probs = model.prior.probs.clone()

    @staticmethod
    def timm(average: Model, model: Model) -> None:
        utils = pytest.importorskip("timm.utils")
        for version in (utils.ModelEmaV2, utils.ModelEmaV3):
            ema = version(model)
            ema.module = average
            ema.update(model)


@pytest.mark.parametrize("way", ["swa", "buffers", "state", "assigned", "timm"])
@pytest.mark.parametrize("inference", [False, True])
def test_an_average_weighs_by_its_own_prior(way: str, inference: bool) -> None:
    model = trained(Model())
    average = copy.deepcopy(model)
    y = torch.arange(5)
    with torch.inference_mode(inference):
        before = average.prior.rows(y, 0.4).clone()
    trained(model, 5)
    with torch.no_grad():
        getattr(Kept, way)(average, model)
    with torch.inference_mode(inference):
        found = average.prior.rows(y, 0.4)
    assert not found.equal(before)
    torch.testing.assert_close(found, average.prior.probs**0.4)
    torch.testing.assert_close(average.prior.totals(y, 0.4), (average.prior.probs**0.4).sum(1))


def test_a_validation_in_inference_mode_may_come_before_the_training() -> None:
    """What it keeps is written in place by the renewal, outside of it, and is part of a graph."""
    model = Model()
    with torch.inference_mode():
        model.eval()(*batch())
    model.train()(*batch()).backward()
    model.prior.renew()
    torch.testing.assert_close(model.prior.rows(torch.arange(5), 0.4), model.prior.probs**0.4)
    with torch.inference_mode():
        model.train()(*batch())
    model.prior.renew()
    torch.testing.assert_close(model.prior.rows(torch.arange(5), 0.4), model.prior.probs**0.4)


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_a_validation_whose_criterion_is_left_in_training_mode_is_not_counted(without: Any) -> None:
    """As loops have it: model.eval(), and the criterion beside it."""
    model = Model().train()
    model(*batch()).backward()
    before = [number.clone() for number in numbers(model.prior)]
    with without():
        loss = model(*batch())
    assert loss.isfinite()
    for mine, theirs in zip(numbers(model.prior), before, strict=True):
        assert mine.equal(theirs)


@pytest.mark.parametrize("by_hand", [False, True])
def test_an_attack_with_the_training_s_criterion_is_told_and_in_eval_mode_not_counted(by_hand: bool) -> None:
    """As TRADES' loop has one criterion for both."""
    model = Model()
    x, _, y = batch()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            model.held.train(not by_hand)
            with torch.no_grad():
                reference = model.net(x)
            moved = x.clone().requires_grad_()
            torch.autograd.grad(model.held(model.net(moved), reference, y), moved)
            model.held.train()
            model(x, moved.detach(), y).backward()
            model.held.renew()
    assert [str(w.message) for w in told if "eval()" not in str(w.message)] == []
    assert len(told) == (0 if by_hand else 2)
    model(*batch())
    assert model.prior.counts.sum() == len(y)


def test_a_teacher_of_one_kind_is_told_nothing() -> None:
    """A fixed one in distillation, one that is trained in adversarial training, and one after the other by epochs."""
    model = Model()
    x, moved, y = batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for fixed in (True, False):
            for _ in range(2):
                clean = model.net(x)
                model.held(model.net(moved), clean.detach() if fixed else clean, y).backward()
            model.held.renew()


@pytest.mark.parametrize("reentrant", [False, True])
def test_an_activation_checkpoint_counts_a_batch_once(reentrant: bool) -> None:
    plain, checked = Model(), Model()
    checked.load_state_dict(plain.state_dict())
    x, moved, y = batch()
    found = []
    for model, forward in (
        (plain, plain),
        (checked, lambda *a: checkpoint(checked, *a, use_reentrant=reentrant)),
    ):
        loss = forward(x.clone().requires_grad_(), moved, y)
        loss.backward()
        found.append([loss.detach(), model.net.weight.grad, *(v.clone() for v in numbers(model.prior))])
    assert found[0][-1].sum() == 12
    for mine, theirs in zip(*found, strict=True):
        assert mine.equal(theirs)


@pytest.mark.parametrize("dtype", HALF)
def test_in_a_network_of_half_precision_the_loss_is_that_of_float32(dtype: torch.dtype) -> None:
    model = trained(Model()).to(dtype)
    x, moved, y = batch(9)
    clean, adversarial = (model.net(v.to(dtype)) for v in (x, moved))
    expected = copy.deepcopy(model.held)(adversarial.float(), clean.float(), y)
    found = model(x.to(dtype), moved.to(dtype), y)
    assert found.dtype == torch.float32 and found.equal(expected)
    found.backward()
    assert model.net.weight.grad.dtype == dtype


@pytest.mark.parametrize("gamma", [0.4, 1.0])
def test_compiled_it_follows_every_change_of_the_prior_without_another_graph(gamma: float) -> None:
    """By renewal, loading and averages; an update inside, and the range of labels, stay as they are without."""
    graphs = []

    def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    criterion = GKLLoss(5, **(SETTINGS | {"gamma": gamma}))
    compiled = torch.compile(criterion, backend=counting, fullgraph=True)
    plain = copy.deepcopy(criterion)
    other = trained(Model(), 11).held
    draw = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, 16, 5, generator=draw)
    y = torch.arange(16) % 5
    for change in (
        lambda c: c.renew(),
        lambda c: c.load_state_dict(other.state_dict()),
        lambda c: c.prior.probs.copy_(other.prior.probs.flip(0)),
        lambda c: c.renew(),
    ):
        torch.testing.assert_close(compiled(student, teacher, y), plain(student, teacher, y))
        torch.testing.assert_close(numbers(criterion.prior), numbers(plain.prior))
        change(criterion), change(plain)
    assert len(graphs) == 1
    with pytest.raises(RuntimeError, match=r"labels must lie in 0\.\.4"):
        compiled(student, teacher, y - 1)


# --- several processes ------------------------------------------------------------------------------------------------


def _process(folder: str) -> None:
    """Two epochs of half a batch each, the criterion inside DDP; then a checkpoint in the middle of the third, and its end."""
    number = dist.get_rank()
    torch.manual_seed(number)
    model = Model()
    network = DistributedDataParallel(
        model
    )  # with its buffers broadcast at each forward, as it is by default
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    found = []
    for epoch in range(3):
        for step in range(2):
            x, moved, y = (v[number::2] for v in batch(10 * epoch + step))
            optimizer.zero_grad()
            network(x, moved, y).backward()
            optimizer.step()
        if epoch == 2:
            model.prior.merge()
            if number == 0:
                torch.save(model.state_dict(), f"{folder}/middle.pt")
            dist.barrier()
            state = torch.load(f"{folder}/middle.pt", weights_only=True)
            model.load_state_dict(state)
            if number:  # as torch.distributed.checkpoint has it, which sends parameters and buffers alone
                model.prior.sums.fill_(9.0)
                model.load_state_dict(
                    {k: v for k, v in state.items() if not k.endswith((".sums", ".counts"))}
                )
        model.prior.renew()
        found.append(model.prior.probs.clone())
    torch.save({"probs": found, "model": model.net.state_dict()}, f"{folder}/{number}.pt")


def test_inside_ddp_every_process_s_predictions_count_once(tmp_path: Path) -> None:
    on_processes(_process, tmp_path, str(tmp_path))
    one, other = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in range(2))
    alone = Model()
    alone.net.load_state_dict(one["model"])
    for epoch, (mine, theirs) in enumerate(zip(one["probs"], other["probs"], strict=True)):
        assert mine.equal(theirs)
        for step in range(2):
            alone(*batch(10 * epoch + step))
        alone.prior.renew()
        torch.testing.assert_close(mine, alone.prior.probs)


def test_probs_are_a_mean_of_predictions_as_float64_has_it() -> None:
    """In a half-precision module over many small batches, where half sums would stand still at 2048."""
    prior = nn.ModuleList([ClassPrior(2)]).half()[0]
    logits = torch.tensor([[0.3, -0.2]]).half()
    for _ in range(3000):
        prior.update(logits, torch.tensor([0]))
    assert prior.counts[0] == 3000
    prior.renew()
    torch.testing.assert_close(prior.probs[0], F.softmax(logits[0].float(), -1), rtol=1e-6, atol=0)


def test_the_module_gives_each_example_s_loss_as_the_function_does() -> None:
    torch.manual_seed(0)
    student, teacher, labels = torch.randn(6, 4), torch.randn(6, 4), torch.arange(6) % 4
    settings = {"alpha": 3.0, "beta": 2.0, "gamma": 0.5}
    each = GKLLoss(4, **settings, reduction="none")(student, teacher, labels)
    assert each.shape == (6,)
    assert torch.equal(
        each, gkl_loss(student, teacher, ClassPrior(4).at(labels), **settings, reduction="none")
    )
    with pytest.raises(ValueError, match="reduction"):
        GKLLoss(4, **settings, reduction="sum")(student, teacher, labels)  # type: ignore[arg-type]
