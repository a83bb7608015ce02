"""The tables of results/benchmarks/*.json, into results/benchmarks/README.md; the first, of all targets, also on the screen.

python benchmarks/table.py    # make bench ends with it
"""

import json
from collections.abc import Iterator
from typing import Any

from timing import RESULTS

HEAD = """# Benchmarks

<!-- Written by benchmarks/table.py from the files beside it; do not edit. -->

Ratios of variants that took turns within one run: median [quartiles] over the rounds, beside the target. What was found equal in the
same command stands in the last column. `make bench` measures them anew; `DKL_REF=<a checkout of the authors' code>` adds their code.
"""

# What can be measured on a GPU alone, by benchmark.
ON_GPU = {
    "loss": [
        ("the Triton loss / kl_div, 2048 x 1000 and 16384 x 150", "≤ 0.4"),
        ("the same, 128 x 100", "≤ 0.6"),
    ],
    "step": [
        ("the authors' step / the fastest of ours, wrn_34_10", "≥ 4"),
        ("the same, preact_resnet_18", "≥ 5"),
        ("the card works, percent of a step", "≥ 90"),
    ],
    "distillation": [("GKL-KD: published / ours replayed", "≥ 3")],
    "autoattack": [("AutoAttack standard of a ResNet-18: stock / ours", "≥ 2")],
}


def cells(row: dict[str, Any]) -> tuple[str, str, str, str]:
    """What, ratio, target, verdict."""
    low, middle, high = row["ratio"]
    verdict = {True: "met", False: "**missed**", None: ""}[row["met"]]
    return row["what"], f"{middle:.2f} [{low:.2f}, {high:.2f}]", row["target"], verdict


def targets(measured: list[dict[str, Any]]) -> Iterator[tuple[str, str, str, str]]:
    """Every target beside its ratio; those of a GPU as not measured where no card was."""
    for content in measured:
        yield from (cells(row) for row in content["rows"] if row["target"])
    cards = {c["benchmark"] for c in measured if "capability" in c["machine"]}
    for name, wanted in ON_GPU.items():
        if name not in cards:
            yield from ((f"on a GPU: {what}", "not measured", bound, "") for what, bound in wanted)


def main() -> None:
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    measured = [content for content in found if "rows" in content]
    text = [HEAD, "## Targets", "", "| | ratio | target | |", "|---|---:|---:|---|"]
    for row in targets(measured):
        text.append(f"| {' | '.join(row)} |")
        print(f"{row[0]:75} {row[1]:>20} {row[2]:>8} {row[3].strip('*')}".rstrip())
    text.append("")
    for content in measured:
        here = content["machine"]
        text += [
            f"## {content['benchmark']}",
            "",
            f"{content['heading']}. {here['name']}, {here['threads']} threads, torch {here['torch']}, "
            + (f"Triton {here['triton']}, driver {here['driver']}, " if "driver" in here else "")
            + f"code {here['commit']}, {content['finished'][:10]}.",
            "",
            "| | ratio | target | | equal |",
            "|---|---:|---:|---|---|",
        ]
        for row in content["rows"]:
            text.append(f"| {' | '.join((*cells(row), row['equal']))} |")
        held = [row for row in content["rows"] if "profile" in row]
        if held:
            text += [
                "",
                "Where a target is missed, the operators that take ours its time (share of one profiled call):",
                "",
            ]
            text += [f"- {row['what']}: {row['profile']}" for row in held]
        text.append("")
    (RESULTS / "README.md").write_text("\n".join(text))
    print(f"wrote {RESULTS / 'README.md'}")


if __name__ == "__main__":
    main()
