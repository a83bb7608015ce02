"""Claims that no pair of rows decides: each computed from the records, the benchmarks or the losses, with its verdict first.

COMPUTED["gradients_of_dkl"](records)     # "supported: the largest relative difference is 4e-15 ..."
"""

import json
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr

from gkl.losses import dkl
from trainers.runs.records import Record
from trainers.runs.targets import CONFIGS


def gradients_of_dkl(records: Sequence[Record]) -> str:
    """Theorem 1, computed: the largest difference of a gradient of DKL (alpha = beta = 1) from KL's, relative, in float64."""
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for classes in (10, 100, 1000):
        teacher, student = (
            3 * torch.randn(64, classes, generator=generator, dtype=torch.float64) for _ in range(2)
        )
        gradients = []
        for loss in (_kl, dkl):
            sides = [x.clone().requires_grad_() for x in (student, teacher)]
            gradients.append(torch.autograd.grad(loss(*sides), sides))
        for ours, theirs in zip(*gradients, strict=True):
            largest = max(largest, ((ours - theirs).abs().max() / ours.abs().max()).item())
    verdict = "supported" if largest < 1e-12 else "contradicted"
    return f"{verdict}: the largest relative difference is {largest:.0e} (float64, 10 to 1,000 classes, both sides)"


def _kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True)


def scores_by_size(records: Sequence[Record]) -> str:
    """How a long-tailed data set's class sizes and the mean score of the true class go together, Spearman's coefficient, each run."""
    found = []
    for record in records:
        seen = record["assessments"].get("class_scores", {}).get("details", {})
        if len({*seen.get("pictures", ())}) > 1:
            rho = spearmanr(seen["pictures"], seen["scores"]).statistic
            found.append(f"{rho:+.2f} in {record['path']} ({len(seen['scores'])} classes)")
    rule = "Spearman's coefficient of class size and mean score"
    return (
        f"undecided: {rule}, run by run: {'; '.join(found)}" if found else f"undecided: no run has {rule} yet"
    )


def time_over_kd(records: Sequence[Record]) -> str:
    """GKL-KD's step beside KD's, as the benchmark has it: as fast where the ratio's quartiles lie below 1.05, slower where above."""
    found, bounds = [], []
    for path in sorted((CONFIGS.parent / "results/benchmarks").glob("table5-*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        for row in content["rows"]:
            if row["what"].endswith(": kd / gkl"):  # the other way round here
                low, middle, high = (1 / ratio for ratio in reversed(row["ratio"]))
                bounds.append((low, high))
                found.append(f"{middle:.3f} ({low:.3f} to {high:.3f}) for {row['what'].split(':')[0]}")
    slower, as_fast = any(low > 1.05 for low, _ in bounds), all(high <= 1.05 for _, high in bounds)
    verdict = "contradicted" if slower else "supported" if found and as_fast else "undecided"
    return f"{verdict}: GKL-KD's step / KD's, median and quartiles, {'; '.join(found) or 'not measured'}"


COMPUTED: dict[str, Callable[[Sequence[Record]], str]] = {
    "gradients_of_dkl": gradients_of_dkl,
    "scores_by_size": scores_by_size,
    "time_over_kd": time_over_kd,
}
