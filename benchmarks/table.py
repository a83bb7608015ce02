"""The table of results/benchmarks/*.json, into results/benchmarks/README.md: python benchmarks/table.py (make bench ends with it)."""

import json

from timing import RESULTS

HEAD = """# Benchmarks

<!-- Written by benchmarks/table.py from the files beside it; do not edit. -->

Ratios of variants that took turns within one run: median [quartiles] over the rounds, beside the target. What was found equal in the
same command stands in the last column. `make bench` measures them anew; `DKL_REF=<a checkout of the authors' code>` adds their code.
"""


def main() -> None:
    text = [HEAD]
    for path in sorted(RESULTS.glob("*.json")):
        content = json.loads(path.read_text())
        here = content["machine"]
        text += [
            f"## {content['benchmark']}",
            "",
            f"{content['heading']}. {here['name']}, {here['threads']} threads, torch {here['torch']}, code {here['commit']}, "
            f"{content['finished'][:10]}.",
            "",
            "| | ratio | target | | equal |",
            "|---|---:|---:|---|---|",
        ]
        for row in content["rows"]:
            low, middle, high = row["ratio"]
            verdict = {True: "met", False: "**missed**", None: ""}[row["met"]]
            shown = f"{middle:.2f} [{low:.2f}, {high:.2f}]"
            text.append(f"| {row['what']} | {shown} | {row['target']} | {verdict} | {row['equal']} |")
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
