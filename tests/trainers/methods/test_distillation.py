"""Logit methods against slow restatements of their equations, and whole distillation runs: fidelity, resume, processes, cache."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from gkl.distillation import Context, Vanilla
from gkl.distillation.dist import DIST
from gkl.distillation.dkd import DKD
from gkl.distillation.gkl_kd import GKLKD, IKLKD
from gkl.distillation.jsd import JSD
from gkl.distillation.kd import KD
from gkl.distributed import rank
from gkl.losses.objectives import CrossEntropy
from gkl.models import create
from gkl.models.classifier import Taps
from tests.processes import on_processes
from tests.system.test_ranks import assert_equal, scans
from trainers.errors import ConfigError
from trainers.loop.training import Training
from trainers.methods.teacher_logits import LogitsCache
from trainers.runs.compose import compose
from trainers.runs.settings import build, check
from trainers.runs.targets import instantiate
from trainers.runs.teacher import prerequisites

METHODS = ("vanilla", "fitnet", "rkd", "crd", "ofd", "reviewkd", "dkd", "kd", "ikl", "gkl")
FEW = ("gkl", "crd", "fitnet")  # with a prior, with banks that are drawn from, with layers of its own


def each(*methods: str) -> list[Any]:
    """What is the same in all methods is long but for FEW of them."""
    return [name if name in FEW else pytest.param(name, marks=pytest.mark.long) for name in methods]


B, C = 7, 5


def taps(logits: Tensor) -> Taps:
    return Taps([], [], logits[:, :0], logits)


def context() -> Context:
    empty = taps(torch.zeros(2, C))
    return Context(empty, empty, None, torch.arange(20) % C, C, seed=0)


@pytest.fixture
def logits() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(B, C, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.requires_grad_(), teacher, torch.randint(C, (B,), generator=generator)


def softmax(row: Tensor, temperature: float = 1.0) -> list[Tensor]:
    powers = [(z / temperature).exp() for z in row]
    return [p / sum(powers) for p in powers]


def same_value_and_gradient(
    method: Any, logits: tuple[Tensor, Tensor, Tensor], epoch: int, slow: Any
) -> None:
    student, teacher, labels = logits
    method = method.double()
    terms = method(taps(student), taps(teacher), labels, epoch=epoch, index=torch.arange(B))
    whole = {
        "labels": method.label_weight * CrossEntropy()(student, labels),
        **terms,
    }  # as the trainer adds them up
    ours = torch.stack(list(whole.values())).sum(0).mean()
    restated = slow(student, teacher, labels)
    torch.testing.assert_close(ours, restated, rtol=0, atol=1e-12)
    gradients = (torch.autograd.grad(value, student, retain_graph=True)[0] for value in (ours, restated))
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def cross_entropy(student: Tensor, labels: Tensor) -> Tensor:
    return sum(-softmax(s)[int(y)].log() for s, y in zip(student, labels, strict=True)) / B


def soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    pairs = zip(student, teacher, strict=True)
    return sum(-t * s.log() for a, b in pairs for s, t in zip(softmax(a, temperature), softmax(b, temperature), strict=True)) / B  # fmt: skip


def wmse(student: Tensor, teacher: Tensor, weights: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
    """Sum over the batch of the paired squares, by loops, and of the pair weights."""
    value, total = torch.zeros(()), torch.zeros(())
    for s, t, w in zip(student, teacher, weights, strict=True):
        for j in range(C):
            for k in range(C):
                value = value + 0.25 * w[j] * w[k] * ((t[j] - t[k]) - (s[j] - s[k])) ** 2
                total = total + w[j] * w[k]
    return value, total


def test_kd(logits: tuple[Tensor, Tensor, Tensor]) -> None:
    def slow(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        entropy = soft_cross_entropy(teacher, teacher, 4.0)
        kl = soft_cross_entropy(student, teacher, 4.0) - entropy
        return 0.1 * cross_entropy(student, labels) + 0.9 * 16 * kl

    same_value_and_gradient(KD(context(), temperature=4.0, weight=0.9, label_weight=0.1), logits, 1, slow)


def test_dkd(logits: tuple[Tensor, Tensor, Tensor]) -> None:
    def slow(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        total = torch.zeros(())
        for s, t, y in zip(student, teacher, labels.tolist(), strict=True):
            ps, pt = softmax(s, 4.0), softmax(t, 4.0)
            for a, b in ((ps[y], pt[y]), (1 - ps[y], 1 - pt[y])):
                total = total + 1.0 * b * (b / a).log()
            for c in set(range(C)) - {y}:
                a, b = ps[c] / (1 - ps[y]), pt[c] / (1 - pt[y])
                total = total + 6.0 * b * (b / a).log()
        return cross_entropy(student, labels) + 5 / 20 * 16 * total / B

    method = DKD(context(), alpha=1.0, beta=6.0, temperature=4.0, warmup=20)
    same_value_and_gradient(method, logits, 5, slow)


@pytest.mark.parametrize("classes", [2, 3])
def test_dkd_is_finite_where_predictions_saturate(classes: int) -> None:
    student = torch.tensor([[200.0, *([0.0] * (classes - 1))]] * 2, requires_grad=True)
    labels = torch.tensor([0, 1])
    method = DKD(context(), alpha=1.0, beta=8.0, temperature=1.0, warmup=0)
    terms = method(taps(student), taps(-student.detach()), labels, epoch=1, index=labels)
    loss = torch.stack(list(terms.values())).sum()
    loss.backward()
    assert loss.isfinite()
    assert student.grad is not None and student.grad.isfinite().all()


def test_ikl_kd(logits: tuple[Tensor, Tensor, Tensor]) -> None:
    def slow(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        value, _ = wmse(student, teacher, [softmax(t, 100.0) for t in teacher])
        divergence = 12.0 * value / B + 3.0 * soft_cross_entropy(student, teacher, 4.0)
        return cross_entropy(student, labels) + 10 / 20 * divergence

    method = IKLKD(context(), alpha=12.0, beta=3.0, temperature=4.0, weights_temperature=100.0, warmup=20)
    same_value_and_gradient(method, logits, 10, slow)


@pytest.mark.parametrize("weights", ["class", "sample"])
def test_gkl_kd_over_two_epochs(logits: tuple[Tensor, Tensor, Tensor], weights: Any) -> None:
    """The second epoch's class weights are the mean of the teacher's softened predictions in the first."""
    seen: dict[int, list[list[Tensor]]] = {}
    method = GKLKD(context(), alpha=8.0, beta=2.0, gamma=0.3, temperature=4.0, prior_temperature=4.0, weights=weights,
                   warmup=20)  # fmt: skip

    def slow(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        rows = []
        for t, y in zip(teacher, labels.tolist(), strict=True):
            if weights == "sample":
                row = softmax(t, 4.0)
            elif y in seen:
                row = [sum(p[c] for p in seen[y]) / len(seen[y]) for c in range(C)]
            else:
                row = [torch.tensor(1 / C, dtype=torch.float64)] * C
            rows.append([w**0.3 for w in row])
        value, total = wmse(student, teacher, rows)
        divergence = 8.0 * value / total + 2.0 * soft_cross_entropy(student, teacher, 4.0)
        return cross_entropy(student, labels) + epoch / 20 * divergence

    epoch = 1
    same_value_and_gradient(method, logits, epoch, slow)
    method.end_epoch()
    for t, y in zip(logits[1], logits[2].tolist(), strict=True):
        seen.setdefault(y, []).append(softmax(t, 4.0))
    epoch = 2
    same_value_and_gradient(method, logits, epoch, slow)


@pytest.mark.parametrize("weights", ["class", "sample"])
def test_gkl_kd_by_group_is_divided_as_each_card_divides(
    logits: tuple[Tensor, Tensor, Tensor], weights: Any
) -> None:
    """Groups of 3 of 7: wMSE over the sum of pair weights of 3, 3 and 1 pictures, each weighed by its share of the batch."""
    method = GKLKD(context(), alpha=8.0, beta=2.0, gamma=0.3, temperature=1.0, prior_temperature=1.0, weights=weights,
                   warmup=0, normaliser="group")  # fmt: skip
    method.prior.probs.copy_(torch.rand(C, C).softmax(1))
    method.group_size = 3
    assert not method.whole_batch

    def slow(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        total = cross_entropy(student, labels) + 2.0 * soft_cross_entropy(student, teacher, 1.0)
        for few in (slice(0, 3), slice(3, 6), slice(6, 7)):
            rows = [softmax(t) if weights == "sample" else list(method.prior.probs[y])
                    for t, y in zip(teacher[few], labels[few].tolist(), strict=True)]  # fmt: skip
            value, norm = wmse(student[few], teacher[few], [[w**0.3 for w in row] for row in rows])
            total = total + 8.0 * value / norm * len(rows) / B
        return total

    same_value_and_gradient(method, logits, 1, slow)


def test_gkl_kd_without_ba_is_kl_kd(logits: tuple[Tensor, Tensor, Tensor]) -> None:
    """Table I (b): sample-wise, gamma 1, wMSE kept from the student: the gradient is KL's."""
    student, teacher, labels = logits
    dkl = GKLKD(context(), alpha=0.5, beta=0.5, gamma=1.0, temperature=1.0, prior_temperature=1.0, weights="sample",
                warmup=0, break_asymmetry=False, label_weight=0.5).double()  # fmt: skip
    kl = KD(context(), temperature=1.0, weight=0.5, label_weight=0.5)
    one, other = (
        torch.autograd.grad(
            m(taps(student), taps(teacher), labels, epoch=1, index=labels)["distillation"].mean(), student
        )[0]
        for m in (dkl, kl)
    )
    torch.testing.assert_close(one, other, rtol=0, atol=1e-14)


def test_jsd(logits: tuple[Tensor, Tensor, Tensor]) -> None:
    def slow(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        total = 0.0
        for s, t in zip(student, teacher, strict=True):
            for p, q in zip(softmax(s), softmax(t), strict=True):
                middle = (p + q) / 2
                total = total + 0.5 * (p * (p / middle).log() + q * (q / middle).log())
        return cross_entropy(student, labels) + 3.0 * total / B

    same_value_and_gradient(JSD(context(), weight=3.0), logits, 1, slow)


@pytest.mark.parametrize("group", [0, 4])
def test_dist(logits: tuple[Tensor, Tensor, Tensor], group: int) -> None:
    """One minus Pearson's correlation: of each picture's predictions, and of each class's over a group of pictures."""

    def pearson(one: list[Tensor], other: list[Tensor]) -> Tensor:
        a, b = (torch.stack(v) - sum(v) / len(v) for v in (one, other))
        return (a * b).sum() / (a.pow(2).sum().sqrt() * b.pow(2).sum().sqrt() + 1e-8)

    def slow(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        p, q = ([softmax(row, 2.0) for row in z] for z in (student, teacher))
        between = sum(1 - pearson(a, b) for a, b in zip(p, q, strict=True)) / B
        within = torch.zeros(())
        for first in range(0, B, group or B):
            few = range(first, min(B, first + (group or B)))
            columns = [1 - pearson([p[i][c] for i in few], [q[i][c] for i in few]) for c in range(C)]
            within = within + sum(columns) / C * len(few) / B
        return cross_entropy(student, labels) + 4.0 * (0.7 * between + 1.3 * within)

    method = DIST(context(), inter=0.7, intra=1.3, temperature=2.0)
    method.group_size = group
    same_value_and_gradient(method, logits, 1, slow)


def test_the_prior_learns_in_training_alone(logits: tuple[Tensor, Tensor, Tensor]) -> None:
    method = GKLKD(context(), alpha=1.0, beta=1.0, gamma=0.5, temperature=1.0, prior_temperature=1.0, weights="class",
                   warmup=0).double().eval()  # fmt: skip
    method(taps(logits[0]), taps(logits[1]), logits[2], epoch=1, index=logits[2])
    assert method.prior.counts.sum() == 0


def test_a_method_without_its_teacher_says_so(logits: tuple[Tensor, Tensor, Tensor]) -> None:
    method = KD(context(), temperature=4.0, weight=0.9, label_weight=0.1)
    with pytest.raises(ValueError, match="needs a teacher"):
        method(taps(logits[0]), None, logits[2], epoch=1, index=logits[2])


# --- whole runs -------------------------------------------------------------------------------------------------------


def configured(method: str, folder: Path, *overrides: str) -> dict[str, Any]:
    """A student WRN-10-1 of a WRN-16-2, whose weights lie in a published file."""
    torch.manual_seed(7)
    file = folder / "wrn_40_2_vanilla" / "ckpt_epoch_240.pth"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"epoch": 240, "model": create("wrn_16_2", num_classes=10).state_dict()}, file)
    whole = "kd/c100_vanilla/wrn_10_1" if method == "vanilla" else f"kd/c100_{method}/wrn40_2_wrn40_1"
    taught = [] if method == "vanilla" else [
        "teacher.network.name=wrn_16_2", "teacher.network.normalisation=null", "teacher.weights=published",
        f"teacher.folder={folder}", f"paths.outputs={folder}",
    ]  # fmt: skip
    small = ["precision=float64", "batch_size=32", "channels_last=false", "epochs=4"]
    config = compose(
        "train", [f"experiment={whole}", "scale=smoke", "model=wrn_10_1", *taught, *small, *overrides]
    )
    if method == "crd":
        config["distiller"] |= {"negatives": 20, "dim": 8}
    check(config, 1)
    return config


def make_task(method: str, folder: Path, *overrides: str, device: str = "cpu") -> Training:
    config = configured(method, folder, *overrides)
    torch.manual_seed(5)
    model = instantiate(config["model"], num_classes=10)
    if config["precision"] != "float32":
        model = model.double()
    return build(config, data=scans(), model=model, device=torch.device(device))


def train(task: Training, epoch: int, steps: range) -> None:
    task.start_epoch(epoch)
    for step in steps:
        task.train_step(epoch, step)


def ended(task: Training, epoch: int) -> dict[str, Any]:
    row = task.end_epoch(epoch)
    return copy.deepcopy({"row": row, **task.state_dict()})


def test_gkl_kd_equals_the_published_loop(tmp_path: Path) -> None:
    """Two epochs of two whole steps in float64: network, class prior, warm-up, weight decay, learning rate."""
    task = make_task("gkl", tmp_path, "distiller.weights=class", "distiller.gamma=0.2", "epochs=240",
                     "optimizer.lr=0.05", "distiller.warmup=20")  # fmt: skip
    assert task.method.taught_by is not None
    student, teacher = copy.deepcopy(task.model), copy.deepcopy(task.method.taught_by).eval()
    settings = configured("gkl", tmp_path)["distiller"]
    assert (settings["alpha"], settings["beta"]) == (12, 1)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    prior = torch.full((10, 10), 0.1, dtype=torch.float64)
    for epoch in (1, 2):
        task.start_epoch(epoch)
        sums = torch.zeros(10, 10, dtype=torch.float64)
        for step in range(2):
            images, draws, y, view, _ = task.batch(epoch, step)
            x = task.see(images, view, draws)
            task.train_step(epoch, step)
            with torch.no_grad():
                t = teacher(x)
            student.train()
            s = student(x)
            rows = prior[y] ** 0.2
            pairs = rows[:, :, None] * rows[:, None, :]
            gaps = (t[:, :, None] - t[:, None, :]) - (s[:, :, None] - s[:, None, :])
            mse = 0.25 * (gaps**2 * pairs).sum() / pairs.sum()
            soft = -((t / 4).softmax(1) * (s / 4).log_softmax(1)).sum(1).mean()
            hard = -s.log_softmax(1)[torch.arange(len(y)), y].mean()
            optimizer.zero_grad()
            (hard + epoch / 20 * (12 * mse + 1 * soft)).backward()
            optimizer.step()
            for k, label in enumerate(y.tolist()):
                sums[label] += (t[k] / 4).softmax(0)
        task.end_epoch(epoch)
        seen = sums.sum(1) > 0
        prior[seen] = sums[seen] / sums[seen].sum(1, keepdim=True)
    for (name, ours), theirs in zip(
        task.model.state_dict().items(), student.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("method", each(*METHODS))
def test_stopped_within_an_epoch_and_gone_on(method: str, tmp_path: Path) -> None:
    task = make_task(method, tmp_path)
    train(task, 1, range(2))
    task.end_epoch(1)
    train(task, 2, range(1))
    torch.save(task.state_dict(), tmp_path / "checkpoint.pt")
    train(task, 2, range(1, 4))
    resumed = make_task(method, tmp_path)
    resumed.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    train(resumed, 2, range(1, 4))
    assert_equal(ended(task, 2), ended(resumed, 2), method, rtol=0, atol=0)


@pytest.mark.parametrize("method", each("vanilla", "fitnet", "ofd", "reviewkd", "dkd", "kd", "ikl", "gkl"))
def test_a_batch_in_micro_batches_is_the_batch_at_once(method: str, tmp_path: Path) -> None:
    """Four batch-norm groups in one, two and four micro-batches: weights, running statistics, prior; the last batch has 8 pictures."""
    group = ["distiller.normaliser=group"] if method == "gkl" else []
    states = []
    for parts in (1, 2, 4):
        task = make_task(method, tmp_path, "bn_groups=4", f"accumulate={parts}", *group)
        train(task, 2, range(task.steps_per_epoch))
        states.append(ended(task, 2))
    for other in states[1:]:
        assert_equal(states[0], other, method, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", ["rkd", "crd", "gkl"])
def test_what_needs_the_whole_batch_takes_no_micro_batches(method: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="accumulate=2 cannot split the batch of .*use more devices"):
        make_task(method, tmp_path, "bn_groups=2", "accumulate=2")


def test_half_precision_scales_its_loss_and_the_checkpoint_knows_the_scale(tmp_path: Path) -> None:
    huge = make_task("kd", tmp_path, "precision=fp16", "distiller.weight=1000000.0")
    huge.scaler.load_state_dict({**huge.scaler.state_dict(), "scale": 2.0**127})
    before = copy.deepcopy(huge.model.state_dict())
    train(huge, 1, range(1))  # overflows: the step is left out and the scale halved
    assert huge.scaler.get_scale() == 2.0**126
    assert all(torch.equal(before[n], p) for n, p in huge.model.named_parameters())
    task = make_task("kd", tmp_path, "precision=fp16")
    train(task, 1, range(2))
    assert any(not torch.equal(before[n], p) for n, p in task.model.named_parameters())
    task.scaler.update(new_scale=1024.0)
    resumed = make_task("kd", tmp_path, "precision=fp16")
    resumed.load_state_dict(copy.deepcopy(task.state_dict()))
    assert resumed.scaler.state_dict() == task.scaler.state_dict() and resumed.scaler.get_scale() == 1024.0


def twice(task: Training) -> list[dict[str, Any]]:
    train(task, 2, range(2))
    within = copy.deepcopy(task.state_dict())
    train(task, 2, range(2, 3))
    return [within, ended(task, 2)]


def worker(folder: str, methods: tuple[str, ...]) -> None:
    for method in methods:
        states = twice(make_task(method, Path(folder), "bn_groups=2"))
        if rank() == 0:
            torch.save(states, f"{folder}/{method}.pt")


@pytest.mark.parametrize(
    "methods",
    [
        pytest.param(("gkl", "crd"), id="two"),
        pytest.param(METHODS, id="all", marks=pytest.mark.long),  # every method, on two processes
    ],
)
def test_two_processes_equal_one(methods: tuple[str, ...], tmp_path: Path) -> None:
    configured("kd", tmp_path)  # writes the teacher
    on_processes(worker, tmp_path, str(tmp_path), methods)
    for method in methods:
        shared = torch.load(tmp_path / f"{method}.pt", weights_only=True)
        assert_equal(twice(make_task(method, tmp_path, "bn_groups=2")), shared, method, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "precision", ["float32", pytest.param("float64", marks=pytest.mark.long)]
)  # three trainings
def test_kept_logits_change_no_bit_and_save_the_teachers_work(precision: str, tmp_path: Path) -> None:
    """Students and seeds share what is kept of one teacher; the last batch of an epoch is smaller than the others."""
    cache = f"teacher.cache={tmp_path}/logits"

    def ends(method: str, *overrides: str) -> tuple[int, Training]:
        """How many images the teacher was shown in two epochs, and the task after them."""
        task = make_task(method, tmp_path, f"precision={precision}", *overrides)
        teacher = task.method.teacher_logits
        assert teacher is not None and len(task.batches.labels) % 32
        shown, forward = 0, teacher.of

        def counted(x: Tensor) -> Tensor:
            nonlocal shown
            shown += len(x)
            return forward(x)

        teacher.of = counted  # type: ignore[method-assign]
        for epoch in (1, 2):
            train(task, epoch, range(task.steps_per_epoch))
        return shown, task

    images = 2 * len(scans().train_labels)
    for method, overrides in (("kd", []), ("gkl", []), ("gkl", ["seed=1"]), ("gkl", ["augment.flip=0.5"])):
        live, plain = ends(method, *overrides, "teacher.cache=null")
        shown, kept = ends(method, *overrides, cache)
        again, read = ends(method, *overrides, cache)
        assert live == images and again == 0
        assert shown == 0 if (method, overrides) == ("gkl", []) else 0 < shown < images, (method, overrides)
        for task in (kept, read):
            assert_equal(plain.state_dict(), task.state_dict(), method, rtol=0, atol=0)
        assert len(list((tmp_path / "logits").glob("*.logits"))) == 1
    for other in ("augment.padding=2", "batch_size=16"):
        assert ends("kd", cache, other)[0] > 0
    assert len(list((tmp_path / "logits").glob("*.logits"))) == 3
    fitnet = make_task("fitnet", tmp_path, cache).method
    assert fitnet.teacher_logits is not None and fitnet.teacher_logits.cache is None  # sees more than logits
    with pytest.raises(ValueError, match="more than can be counted .* set teacher.cache=null"):
        make_task("kd", tmp_path, cache, "augment.views=[autoaugment]")


def table(path: Path, key: int = 0) -> LogitsCache:
    return LogitsCache(
        path, {"key": key}, torch.zeros(1), pictures=50, views=18, classes=7, dtype=torch.float32
    )


def rows(index: Tensor, view: Tensor) -> Tensor:
    return (index * 100 + view)[:, None] + torch.arange(7) / 8.0


def writer(folder: str) -> None:
    cache = table(Path(folder))
    for number in range(10_000):
        index = torch.arange(50).roll(number)
        cache.put(index, index * number % 18, rows(index, index * number % 18))


@pytest.mark.long  # until two writers have come far enough to be killed
def test_a_killed_writer_leaves_no_wrong_row(tmp_path: Path) -> None:
    writers = [mp.get_context("spawn").Process(target=writer, args=(str(tmp_path),)) for _ in range(2)]
    for process in writers:
        process.start()
    cache, index = table(tmp_path), torch.arange(50)
    seen = 0
    while seen < 300:
        for view in range(18):
            logits, there = cache.get(index, torch.full_like(index, view))
            assert logits[there].equal(rows(index, torch.full_like(index, view))[there])
            seen += int(there.sum())
    for process in writers:
        process.kill()
        process.join()
    cache.put(torch.tensor([3]), torch.tensor([4]), rows(torch.tensor([3]), torch.tensor([4])))
    (path,) = tmp_path.glob("*.logits")
    place = (3 * 18 + 4) * cache.row.itemsize
    with path.open("r+b") as file:  # half a row
        file.seek(place)
        file.write(b"\1\2\3")
    there = table(tmp_path).get(torch.tensor([3, 3]), torch.tensor([4, 4]))[1]
    assert not there.any()
    assert not table(tmp_path, key=1).get(index, index % 18)[1].any()


def test_the_best_epoch_and_the_last_are_both_told(tmp_path: Path) -> None:
    task = make_task("kd", tmp_path)
    rows = []
    for epoch in (1, 2, 3):
        train(task, epoch, range(3))
        rows.append(task.end_epoch(epoch)["test/top1"])
    metrics, details = task.method.evaluate(headline="last", settings={}, folder=tmp_path, console=None)  # type: ignore[arg-type]
    assert metrics == {"top1": rows[-1], "top1_best": max(rows)}
    assert details["best_epoch"] == rows.index(max(rows)) + 1
    assert set(task.weights()) == {"last", "best"}
    assert task.method.origins()["teacher"]["published"] == "wrn_40_2_vanilla"
    assert 0 <= task.method.origins()["teacher"]["top1"] <= 100


def test_a_checkpoint_of_another_teacher_is_refused(tmp_path: Path) -> None:
    state = copy.deepcopy(make_task("kd", tmp_path / "one").state_dict())
    task = make_task("kd", tmp_path / "one")
    file = tmp_path / "one" / "wrn_40_2_vanilla" / "ckpt_epoch_240.pth"
    torch.save({"model": create("wrn_16_2", num_classes=10).state_dict()}, file)
    other = make_task("kd", tmp_path / "one")
    task.load_state_dict(state)
    with pytest.raises(ConfigError, match=r"another teacher \(teacher.sha256 differ"):
        other.load_state_dict(state)


def test_a_missing_or_foreign_teacher_is_named(tmp_path: Path) -> None:
    config = configured("kd", tmp_path)
    file = tmp_path / "wrn_40_2_vanilla" / "ckpt_epoch_240.pth"
    torch.save({"model": create("wrn_16_4", num_classes=10).state_dict()}, file)
    with pytest.raises(ConfigError, match="does not fit the WideResNet"):
        instantiate(config["teacher"]).load(10)
    file.unlink()
    with pytest.raises(ConfigError, match=f"weights {file} are missing; unpack .*\\(GKL_TEACHERS"):
        instantiate(config["teacher"]).check()
    config["teacher"]["weights"] = "own"
    with pytest.raises(
        ConfigError, match="kd/c100_vanilla/wrn_16_2 has no record; train it first: make teachers"
    ):
        instantiate(config["teacher"]).check()


def test_a_teacher_shares_its_students_data_and_schedule() -> None:
    student = compose("train", ["experiment=kd/c100_gkl/vgg13_vgg8", "scale=smoke", "epochs=3", "seed=2",
                                "distiller.gamma=0.9", "data=cifar10"])  # fmt: skip
    teacher = prerequisites(student)["teacher"]
    usual = compose("train", ["experiment=kd/c100_vanilla/vgg_13", "scale=smoke"])
    assert teacher == {
        **usual, "epochs": 3, "data": student["data"], "overrides": ["epochs=3", "data=cifar10"],
    }  # fmt: skip
    assert not prerequisites({**student, "teacher": {**student["teacher"], "weights": "published"}})
    assert not prerequisites(usual)


def test_a_teacher_has_what_it_is_asked_for_and_shares_the_rest() -> None:
    words = ["experiment=kd/c100_gkl/resnet56_resnet20", "scale=smoke", "batch_size=16", "epochs=3"]
    student = compose("train", [*words, "teacher.run='kd/c100_vanilla/resnet_56 epochs=9'"])
    teacher = prerequisites(student)["teacher"]
    assert (student["epochs"], teacher["epochs"], teacher["batch_size"]) == (3, 9, 16)
    assert teacher["overrides"] == ["epochs=9", "batch_size=16"]


def test_networks_without_taps_are_refused(tmp_path: Path) -> None:
    config = configured("vanilla", tmp_path)
    with pytest.raises(ValueError, match="needs a network with taps"):
        build(config, data=scans(), model=create("preact_resnet_18", 10).double(), device=torch.device("cpu"))


def test_vanilla_is_the_cross_entropy(logits: tuple[Tensor, Tensor, Tensor]) -> None:
    same_value_and_gradient(Vanilla(context()), logits, 1, lambda s, t, y: cross_entropy(s, y))
