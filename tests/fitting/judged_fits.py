"""The defaults of a fit, judged on the networks of `source_networks`, over seeds. Not a test.

    python tests/fitting/judged_fits.py NETS OUT --data CIFAR [--minutes 20] [--seeds 0 1 2] [--only NAME ...] [--tied]

fits OUT/NAME-BLOCKS-SEED.safetensors by `resode deepen --blocks BLOCKS --fit CIFAR`, or by `resode tie --depth-weights
tied+norms`, measures the accuracy and the gradients of each, and prints what they lost. A network of which OUT has the
figures is not fitted again, so that a run can be cut off. Times mean something on a quiet machine only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from source_networks import HELD_BACK, SOURCES, Source, data_of

STEPS = 36  # of each stage
DEEPER, DEEPER_STEPS = ("resnet56", "pre_activation"), 100


def resode(*arguments: str) -> Any:
    found = subprocess.run(
        [sys.executable, "-m", "resode_cli", *arguments, "--json"], check=True, stdout=subprocess.PIPE
    )
    return json.loads(found.stdout)


def judged(source: Source, blocks: int | None, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """The figures of one fit, from OUT where they are there. blocks: None, and it is tied."""
    out = given.out / f"{source.name}-{blocks or 'tied'}-{seed}.safetensors"
    figures = out.with_suffix(".json")
    if figures.exists():
        return dict(json.loads(figures.read_text()))
    data = data_of(source, given.data)
    how = ["deepen", "--blocks", str(blocks)] if blocks else ["tie", "--depth-weights", "tied+norms"]
    fit = ["--fit", data, "--data", data, "--seed", str(seed), "--fit-minutes", str(given.minutes)]
    more = ["--no-gradients", "--trust-source", "--force", "-o", str(out)]
    found = resode(how[0], str(given.nets / f"{source.name}.safetensors"), *how[1:], *fit, *more)
    if blocks:
        methods = ["--adjoint", "multistep,auto", "--memory-budget", "lean", "--data", data, "--trust-source"]
        found["gradients"] = resode("check-grad", str(out), *methods)
    figures.write_text(json.dumps(found, indent=1))
    return dict(found)


def errors(found: dict[str, Any], method: str) -> float:
    """The largest relative gradient error of a stage."""
    methods = found["gradients"]["methods"]
    return max(row["relative_error"] for own in methods if own["name"].startswith(method) for row in own["stages"])


def rows(given: argparse.Namespace) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A network at a depth, and its fits so far, one more each time."""
    for source in SOURCES:
        if (given.only and source.name not in given.only) or not (given.nets / f"{source.name}.safetensors").exists():
            continue
        depths: list[int | None] = [None] if given.tied else [STEPS]
        if source.name in DEEPER and not given.tied:
            depths.append(DEEPER_STEPS)
        for blocks in depths:
            name = f"{source.name} at {blocks}" if blocks else f"{source.name}, tied+norms"
            yield name, [judged(source, blocks, seed, given) for seed in given.seeds]


def table_of(found: dict[str, list[dict[str, Any]]], *, tied: bool) -> Table:
    table = Table(title="points lost against the source, by the defaults of a fit")
    for column in ("network", "source", "lost, by seed", "mean", "agreement", "minutes"):
        table.add_column(column)
    if not tied:
        table.add_column("multistep")
        table.add_column("auto")
    for name, fits in found.items():
        lost = [fit["points_lost"] for fit in fits]
        table.add_row(
            name,
            f"{fits[0]['before']['top1']:.2%}",
            " ".join(f"{points:.2f}" for points in lost),
            f"{statistics.mean(lost):.2f}",
            f"{statistics.mean(fit['top1_agreement'] for fit in fits):.1%}",
            f"{statistics.mean(fit['fit']['seconds'] for fit in fits) / 60:.1f}",
            *([] if tied else [f"{max(errors(fit, method) for fit in fits):.2g}" for method in ("multistep", "auto")]),
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nets", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=[source.name for source in SOURCES])
    parser.add_argument("--tied", action="store_true")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    console, found = Console(width=120), dict[str, list[dict[str, Any]]]()
    for name, fits in rows(given):
        found[name] = fits
        console.print(table_of(found, tied=given.tied))
    means = {name: statistics.mean(fit["points_lost"] for fit in fits) for name, fits in found.items()}
    for called, chosen in (
        ("all", list(means)),
        ("held back", [name for name in means if name.startswith(HELD_BACK)]),
    ):
        if chosen:
            of = [means[name] for name in chosen]
            console.print(f"{called}: mean {statistics.mean(of):.2f}, worst {max(of):.2f} points")


if __name__ == "__main__":
    main()
