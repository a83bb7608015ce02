"""GKL forward and backward against PyTorch's own KL divergence, a restatement, the authors' pairs and itself compiled, in turn.

    python benchmarks/loss.py [--device cuda] [--rounds 8] [--processes 5] [--compile]
    DKL_REF=<a checkout of the authors' code> python benchmarks/loss.py

Ratios are time(ours) / time(F.kl_div(log_softmax(student), softmax(teacher))), or as a row says. "fixed": gradient to the student alone
(distillation); "both": to both logits (adversarial training). Weights: class-wise rows of the prior (gather included) or
sample-wise. Before the clock, in float64: the largest difference of the gradients from the restatement's and, where DKL_REF names a
checkout, from the authors' `dkl_loss`, relative to their largest entry; in float32, how far gradients stand from float64's on the same
rounded logits when a common offset is added. The rounds are those of several processes, since where a process's memory lies
moves a ratio by up to a half. On a GPU one process, ours is the Triton kernels, the eager form stands beside them and what
torch.compile makes of it only with --compile; and the peak of memory that a forward and backward adds, in tensors of the logits' size.
"""

import argparse
import ast
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import AS_PUBLISHED, Row, explained, interleaved, ratios, report, spread, switched
from torch import Tensor

from gkl.losses import closed_form
from gkl.losses.objectives import GKL
from gkl.losses.prior import ClassPrior

ON_CPU = ((128, 100), (512, 1000), (2048, 1000), (64, 21841), (16384, 150))
ON_GPU = ((128, 100), (2048, 1000), (64, 21841), (16384, 150))
AT_MOST = {"cpu": (1.35, 1.1), "cuda": (0.6, 0.4)}  # ours / kl_div of few logits, and from LARGE on
LARGE = 512 * 1000
ALPHA, BETA, GAMMA = 20.0, 4.0, 0.4
PAIRS_UP_TO = 60_000_000  # entries of the authors' (B, C, C) tensors that are still tried
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # student, teacher, weights before the power -> scalar


def straight_line(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """Algorithm 1 in O(B C), line by line, with autograd's own gradient."""
    v = weights.pow(GAMMA)
    total = v.sum(1, keepdim=True)
    d = teacher - student
    centred = d - (v * d).sum(1, keepdim=True) / total
    wmse = 0.5 * (total.squeeze(1) * (v * centred.square()).sum(1)).sum() / total.square().sum()
    cross_entropy = -(F.softmax(teacher, 1).detach() * F.log_softmax(student, 1)).sum(1).mean()
    return ALPHA * wmse + BETA * cross_entropy


def kl_div(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(student, -1), F.softmax(teacher, -1), reduction="batchmean")


def published() -> Loss | None:
    """The authors' dkl_loss for adversarial training, out of their file; None without DKL_REF."""
    if "DKL_REF" not in os.environ:
        return None
    path = Path(os.environ["DKL_REF"]) / "DKLv2/Adv-training-dkl/utils_awp.py"
    if not path.is_file():
        raise SystemExit(f"error: DKL_REF must name a checkout of the authors' code, there is no {path}")
    names: dict[str, Any] = {"torch": torch, "F": F}
    body = [
        n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef) and n.name == "dkl_loss"
    ]
    exec(compile(ast.Module(body, []), str(path), "exec"), names)
    function = names["dkl_loss"]

    def loss(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
        # Their names are the other way round: alpha weighs the cross-entropy. 0.25 stands inside.
        return function(student, teacher, alpha=BETA, beta=ALPHA, gamma=GAMMA, CLASS_PRIOR=weights)

    return loss


class Case:
    """Logits and weights of one size, and the calls that are timed."""

    def __init__(self, batch: int, classes: int, weights: str, fixed: bool, device: torch.device) -> None:
        torch.manual_seed(0)
        self.student = torch.randn(batch, classes, device=device, requires_grad=True)
        self.teacher = torch.randn(batch, classes, device=device, requires_grad=not fixed)
        self.labels = torch.randint(classes, (batch,), device=device)
        self.prior = ClassPrior(classes if weights == "class" else 2).to(device)
        if weights == "class":
            self.prior.probs.copy_(torch.randn(classes, classes).softmax(-1))
        self.objective = GKL(ALPHA, BETA, GAMMA, weights="class" if weights == "class" else "sample")
        self.wanted = [x for x in (self.student, self.teacher) if x.requires_grad]

    def trained(self) -> None:
        """Ours as trainings call it: a value for each example, and their mean."""
        value = self.objective(self.student, self.teacher, self.labels, self.prior).mean()
        torch.autograd.grad(value, self.wanted)

    def ours(self) -> None:
        """The mean; on a GPU taken inside the kernel, as kl_div's is by its own."""
        if not self.student.is_cuda:
            return self.trained()
        rows = self.prior.at(self.labels) if self.objective.weights == "class" else None
        value = closed_form.gkl(
            self.student, self.teacher, rows, alpha=ALPHA, beta=BETA, gamma=GAMMA, validate=False
        )
        torch.autograd.grad(value, self.wanted)

    def eager(self) -> None:
        there, closed_form.HAS_TRITON = closed_form.HAS_TRITON, False
        try:
            self.ours()
        finally:
            closed_form.HAS_TRITON = there

    def added(self) -> float:
        """Peak of the memory that a call of ours adds on a GPU, in tensors of the logits' size."""
        self.ours()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.ours()
        more = torch.cuda.max_memory_allocated() - before
        return more / (self.student.numel() * self.student.element_size())

    def of(self, loss: Loss) -> Callable[[], object]:
        """The same of another loss, with the same weights made in the same way."""
        by_class = self.objective.weights == "class"

        def call() -> object:
            weights = self.teacher  # which kl_div does not look at
            if loss is not kl_div:
                weights = self.prior[self.labels] if by_class else F.softmax(self.teacher.detach(), -1)
            return torch.autograd.grad(loss(self.student, self.teacher, weights), self.wanted)

        return call

    def compiled(self) -> Callable[[], object]:
        """Ours under torch.compile, weights made inside."""
        probs, by_class = self.prior.probs, self.objective.weights == "class"

        @torch.compile(fullgraph=True, dynamic=False)
        def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
            weights = probs[labels] if by_class else None
            return closed_form.gkl(
                student, teacher, weights, alpha=ALPHA, beta=BETA, gamma=GAMMA, validate=False
            )

        return lambda: torch.autograd.grad(loss(self.student, self.teacher, self.labels), self.wanted)


def gradients(loss: Loss, student: Tensor, teacher: Tensor, weights: Tensor) -> list[Tensor]:
    pair = [student.clone().requires_grad_(), teacher.clone().requires_grad_()]
    return list(torch.autograd.grad(loss(*pair, weights), pair))


def ours(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    return closed_form.gkl(student, teacher, weights, alpha=ALPHA, beta=BETA, gamma=GAMMA, validate=False)


def differences(device: torch.device, theirs: Loss | None) -> str:
    """How far our float64 gradients are from the others', and our float32 ones from float64's, over offsets."""
    torch.manual_seed(0)
    teacher = torch.randn(64, 100, device=device, dtype=torch.float64)
    student = teacher + 0.3 * torch.randn_like(teacher)
    weights = torch.randn_like(teacher).softmax(-1)
    mine = gradients(ours, student, teacher, weights)
    found = {"restatement": straight_line, **({"authors'": theirs} if theirs else {})}
    text = []
    for name, loss in found.items():
        pairs = zip(mine, gradients(loss, student, teacher, weights), strict=True)
        text.append(f"{name} {max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs):.0e}")
    return "float64 gradients from ours: " + ", ".join(text)


def offsets(device: torch.device) -> dict[str, float]:
    """wMSE's float32 gradient against float64's on the same rounded logits, relative in the Euclidean norm, by offset."""
    found = {}
    for offset in (0.0, 100.0, 1000.0, 1e4):
        torch.manual_seed(0)
        teacher = torch.randn(64, 100, device=device) + offset
        student = teacher + 0.3 * torch.randn(64, 100, device=device)
        weights = (teacher - offset).softmax(-1)

        def wmse(s: Tensor, t: Tensor, w: Tensor) -> Tensor:
            return closed_form.gkl(s, t, w, alpha=ALPHA, beta=0.0, gamma=GAMMA, validate=False)

        single, double = (
            gradients(wmse, *(x.to(d) for x in (student, teacher, weights)))
            for d in (torch.float32, torch.float64)
        )
        found[f"{offset:g}"] = max(
            float((a - b).norm() / b.norm()) for a, b in zip(single, double, strict=True)
        )
    return found


def measured(
    device: torch.device, rounds: int, seconds: float | None = None, compiled: bool | None = None
) -> list[Row]:
    """Every row, in this process. seconds: for all of them; None takes every round. compiled: on a GPU only where asked for."""
    on_card = device.type == "cuda"
    compiled = not on_card if compiled is None else compiled
    # A freed tensor of 29 MB, as any training frees: before that glibc gives each larger one back to the system and fetches it anew.
    torch.empty(7 << 20)
    theirs = published()
    equal, kept = differences(device, theirs), offsets(device)
    rows = [
        Row(
            "float32 gradient error x 1e7, largest of the offsets 0 to 1e4",
            [max(kept.values()) * 1e7],
            at_most=2.0,
            more={"by_offset": kept},
        )
    ]
    cases = [
        (batch, classes, weights, scope)
        for batch, classes in (ON_GPU if on_card else ON_CPU)
        # A (C, C) prior of 21,841 classes would take 2 GB: sample-wise alone.
        for weights in (("class", "sample") if classes < 5000 else ("sample",))
        for scope in ("both", "fixed")
    ]
    for batch, classes, weights, scope in cases:
        case = Case(batch, classes, weights, scope == "fixed", device)
        several = batch * classes >= LARGE
        variants: dict[str, Callable[[], object]] = {
            "kl_div": case.of(kl_div),
            "ours": case.ours,
            "restatement": case.of(straight_line),
        }
        if compiled and ((weights, scope) in (("class", "fixed"), ("class", "both")) or classes > 5000):
            variants["compiled"] = case.compiled()
        if theirs and weights == "class" and batch * classes**2 <= PAIRS_UP_TO:
            variants["authors'"] = case.of(theirs)
        if on_card:
            variants |= {"eager": case.eager, "as trainings call it": case.trained}
        share = None if seconds is None else seconds / len(cases)
        times = interleaved(variants, device, rounds, at_least=0.02, seconds=share)
        bound = AT_MOST[device.type][several]
        name = f"{batch} x {classes}, {weights}-wise, {scope}"
        row = Row(f"{name}: ours / kl_div", ratios(times, "ours", "kl_div"), at_most=bound, equal=equal)
        if on_card:
            row.more["microseconds"] = {n: round(1e6 * min(t), 1) for n, t in times.items()}
        rows.append(explained(row, variants["ours"], device))
        if "compiled" in variants:
            row = Row(f"{name}: ours compiled / kl_div", ratios(times, "compiled", "kl_div"),
                      at_most=None if on_card else 0.75)  # fmt: skip
            rows.append(explained(row, variants["compiled"], device))
        rows.append(Row(f"{name}: restatement / ours", ratios(times, "restatement", "ours")))
        if on_card:
            called = ratios(times, "as trainings call it", "kl_div")
            rows.append(Row(f"{name}: ours as trainings call it / kl_div", called))
        for other in ("authors'", "eager"):
            if other in variants:
                rows.append(Row(f"{name}: {other} / ours", ratios(times, other, "ours")))
        if on_card and several and scope == "both":
            # Both gradients, and of each row a few sums.
            rows.append(Row(f"{name}: memory added, logits' tensors", [case.added()], at_most=2.1))
        equal = ""
        del case, variants
        if compiled:
            torch.compiler.reset()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--processes", type=int)
    parser.add_argument("--compile", action="store_true", help="on a GPU, too: takes minutes")
    parser.add_argument("--seconds", type=float, help="for the timing; on a GPU 25")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    on_card = device.type == "cuda"
    processes = arguments.processes or (1 if on_card else 5)
    seconds = arguments.seconds or (25.0 if on_card else None)
    compiled = arguments.compile or not on_card
    with switched(AS_PUBLISHED):
        rows = spread(processes, lambda: measured(device, arguments.rounds, seconds, compiled))
    report("loss", "time ratios, forward and backward", rows, device)


if __name__ == "__main__":
    main()
