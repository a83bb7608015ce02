"""Sweeps: the runs of every combination of some settings' values, or of those that Optuna proposes within intervals."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep
from hydra.errors import HydraException

from trainers.errors import ConfigError
from trainers.loop.accuracy import attack_name
from trainers.runs.compose import choices, completed, completed_by
from trainers.runs.identity import config_hash
from trainers.runs.plan import Cell, cells
from trainers.runs.records import read_record
from trainers.runs.reproduce import concurrent_runs

Point = dict[str, Any]  # dotted setting -> value


@dataclass(frozen=True)
class Interval:
    """Between which bounds Optuna looks for a setting's value, on a logarithmic scale if asked."""

    low: float
    high: float
    log: bool


@dataclass(frozen=True)
class Sweep:
    """What a person typed: the experiment, the swept settings with their values or intervals, and what all runs share."""

    experiment: str
    swept: Mapping[str, Sequence[Any] | Interval]
    shared: Sequence[str]

    @property
    def searched(self) -> bool:
        """Whether values are looked for in an interval."""
        return any(isinstance(values, Interval) for values in self.swept.values())

    @property
    def name(self) -> str:
        """What its files are called after."""
        return "-".join([self.experiment.replace("/", "-"), *self.swept])

    def grid(self) -> list[Point]:
        """Every combination of the values."""
        values = [v for v in self.swept.values() if not isinstance(v, Interval)]
        return [dict(zip(self.swept, combination, strict=True)) for combination in itertools.product(*values)]

    def table(self, points: Sequence[Point], metrics: Mapping[str, str] | None = None) -> dict[str, Any]:
        """A table with a row for each point, as configs/table has them."""
        rows = [
            {"id": ",".join(f"{k}={v}" for k, v in point.items()), "experiment": self.experiment, "overrides": point,
             "paper": {}, **{key: str(value) for key, value in point.items()}}
            for point in points
        ]  # fmt: skip
        return {
            "title": f"Sweep of {self.experiment} over {', '.join(self.swept)}", "target": "sweep", "name": self.name,
            "rows": rows, "labels": {key: key for key in self.swept}, "metrics": metrics or {},
        }  # fmt: skip


def read_sweep(overrides: list[str]) -> Sweep:
    """What is swept and what is shared. Raises ConfigError."""
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except HydraException as error:
        raise ConfigError(f"cannot read the overrides: {' '.join(str(error).split())}") from None
    experiments = [str(o.value()) for o in parsed if o.key_or_group == "experiment"]
    if len(experiments) == 1 and (group := completed_by(experiments[0])):
        raise ConfigError(
            f"a sweep names its experiment whole: experiment={experiments[0]}/{choices(group)[0]}, or another {group}"
        )
    stem = completed(experiments[0])[0].removeprefix("experiment=") if len(experiments) == 1 else None
    if stem not in choices("experiment"):
        raise ConfigError(f"a sweep needs one experiment=...; one of: {', '.join(choices('experiment'))}")
    swept: dict[str, Sequence[Any] | Interval] = {}
    shared = []
    for override in parsed:
        if override.is_sweep_override():
            if "." not in override.key_or_group:
                raise ConfigError(
                    f"a sweep goes over settings such as loss.gamma, got {override.input_line!r}"
                )
            value = override.value()
            if isinstance(value, IntervalSweep):
                low, high, log = float(value.start or 0.0), float(value.end or 0.0), "log" in value.tags
                if not low < high or (log and low <= 0):
                    raise ConfigError(
                        f"an interval goes from a lower to a higher value, above 0 on a logarithmic scale, got {override.input_line!r}"
                    )
                swept[override.key_or_group] = Interval(low, high, log)
            else:
                swept[override.key_or_group] = list(override.sweep_iterator())
        elif override.key_or_group != "experiment":
            shared.append(str(override.input_line))
    if not swept:
        raise ConfigError(
            "nothing to sweep: give a setting several values, as in loss.gamma=0,0.2,0.4, or loss.gamma=interval(0,1) and trials=20"
        )
    return Sweep(experiments[0], swept, shared)


def planned(sweep: Sweep, points: Sequence[Point], settings: Mapping[str, Any]) -> list[Cell]:
    """The runs of some points."""
    chosen = {key: settings[key] for key in ("scale", "protocol", "seeds")}
    return cells(sweep.table(points), **chosen, overrides=sweep.shared)


def metrics_of(cell: Cell) -> dict[str, str]:
    """What a sweep shows of such runs, and Optuna makes as large as it can."""
    settings = cell.config.get("evaluation")
    if not settings:
        return {"top1_best": "Best epoch", "top1": "Last epoch"}
    name = attack_name(settings)
    return {"clean": "Clean", name: {"aa": "AA"}.get(name, name)}


class Search:
    """Points that Optuna proposes, a few at a time, kept in a journal that survives this process.

    The objectives are the metrics' means over the seeds, all to be made large: the result is their front.
    """

    def __init__(self, sweep: Sweep, settings: Mapping[str, Any]) -> None:
        """Continue the study of that name below `outputs`, or begin it. Raises ConfigError without Optuna."""
        try:
            import optuna
            from optuna.storages import JournalStorage
            from optuna.storages.journal import JournalFileBackend
        except ImportError:
            raise ConfigError("a sweep over intervals needs Optuna: pip install 'gkl[optuna]'") from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.optuna, self.sweep, self.settings = optuna, sweep, settings
        self.usual = planned(sweep, [self._middle()], settings)
        config = self.usual[-1].config
        self.metrics = list(metrics_of(self.usual[-1]))
        stem = f"{sweep.name}-{settings['scale']}-{settings['protocol']}"
        journal = Path(config["paths"]["outputs"]) / "sweeps" / f"{stem}.optuna.log"
        journal.parent.mkdir(parents=True, exist_ok=True)
        storage = JournalStorage(JournalFileBackend(str(journal)))
        # What else the runs share is part of the name: other pictures, a changed network or epochs are another study.
        name = " ".join(
            [stem, *map(str, sweep.swept.values()), *sorted({config_hash(c.config) for c in self.usual})]
        )
        tried = {s.study_name: s.n_trials for s in optuna.get_all_study_summaries(storage)}.get(name, 0)
        self.study = optuna.create_study(
            storage=storage,
            study_name=name,
            directions=["maximize"] * len(self.metrics),
            sampler=optuna.samplers.TPESampler(seed=tried),  # a restart goes on to other points
            load_if_exists=True,
        )
        self.begun: dict[int, list[Cell]] = {}

    def points(self) -> list[Point]:
        """Every point there is a result of."""
        return [self._point(trial) for trial in self.study.trials if trial.state.name == "COMPLETE"]

    def first(self) -> list[Cell]:
        """The runs to begin with: those of points that a stopped search had begun, then as many new ones as go at once.

        A quarter of all points at most: the others are to learn from them.
        """
        runs = []
        for trial in self.study.trials:
            if trial.state.name == "RUNNING":
                runs += [cell for cell in self._begin(trial) if not cell.recorded]
                self._tell(trial.number)
        each = len(self.usual)
        wanted = min(
            -(-concurrent_runs(self.usual[-1].config, self.settings) // each),
            max(1, self.settings["trials"] // 4),
        )
        while len(self.begun) < wanted and (more := self._next()):
            runs += more
        return runs

    def then(self, done: Cell) -> list[Cell]:
        """After a run: the runs of the next point when it was its point's last and any is left to try."""
        told = [
            n
            for n, runs in [*self.begun.items()]
            if any(c.record == done.record for c in runs) and self._tell(n)
        ]
        return [cell for _ in told for cell in self._next()]

    def _tell(self, number: int) -> bool:
        """Tell Optuna the result of a point once all its runs are done."""
        if not all(cell.recorded for cell in self.begun[number]):
            return False
        found = [read_record(cell.record)["metrics"] for cell in self.begun.pop(number)]
        self.study.tell(number, [sum(f[m] for f in found) / len(found) for m in self.metrics])
        return True

    def _next(self) -> list[Cell]:
        """The missing runs of a new point; one that has its records already is told at once, and another taken."""
        while len([t for t in self.study.trials if t.state.name != "FAIL"]) < self.settings["trials"]:
            trial = self.study.ask(self._distributions())
            runs = self._begin(trial)
            if not self._tell(trial.number):
                return [cell for cell in runs if not cell.recorded]
        return []

    def _begin(self, trial: Any) -> list[Cell]:
        runs = planned(self.sweep, [self._point(trial)], self.settings)
        self.begun[trial.number] = runs
        return runs

    def _point(self, trial: Any) -> Point:
        """Four digits of each value are enough, and make a name that can be read."""
        return {key: float(f"{v:.4g}") if isinstance(v, float) else v for key, v in trial.params.items()}

    def _middle(self) -> Point:
        return {
            k: (v.low + v.high) / 2 if isinstance(v, Interval) else v[0] for k, v in self.sweep.swept.items()
        }

    def _distributions(self) -> dict[str, Any]:
        distributions = self.optuna.distributions
        return {
            key: distributions.FloatDistribution(v.low, v.high, log=v.log)
            if isinstance(v, Interval)
            else distributions.CategoricalDistribution(v)
            for key, v in self.sweep.swept.items()
        }
