"""What people read is right at 80 columns, readable at 60, and whole where there is room."""

from __future__ import annotations

import io
import math
import random
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table

from resode_cli.bench.results import BenchReport, BenchRow
from resode_cli.commands.output import Output, _Console
from resode_cli.commands.progress import fitting, training
from resode_cli.fitting.results import FitStep, PhaseCost
from resode_cli.gradients.gradient_errors import GradientReport, MethodGradients, StageGradient, SweepRow
from resode_cli.gradients.results import Alternative, ChosenAdjoints, PieceChoice
from resode_cli.ode import Adjoint
from resode_cli.reports.bench import bench_table
from resode_cli.reports.choice import choice_table
from resode_cli.reports.fit import block_table, cost_table, figures_table
from resode_cli.reports.report import StageRow, gradient_table, stage_table, sweep_table
from resode_cli.reports.tables import plain_table

STAGES = ("layer1", "layer2", "layer3", "layer4")
METHODS = ("backprop", "checkpoint", "euler", "multistep, anchors 7", "pc, anchors 4, 2 corrections")


def gradients() -> Table:
    rows = tuple(
        StageGradient("stem" if i < 0 else STAGES[i], 24, 0.0123, 0.99987, 0.0056, 1.2e-5, 3.01, 12_345_678, 4, None)
        for i in range(-1, 4)
    )
    methods = tuple(MethodGradients(name, "heun", rows, (), True) for name in METHODS)
    return gradient_table(GradientReport(32, "noise, no data given", "frozen", 2.3, methods))


def bench() -> Table:
    values: dict[str, Any] = {}
    for name, kind in BenchRow.__annotations__.items():
        text = str(kind)
        values[name] = (
            "ok"
            if name == "status"
            else "pc, anchors 4"
            if name == "method"
            else (
                None
                if name.startswith(("largest", "images_per_second_at"))
                else True
                if "bool" in text
                else 12_345
                if "int" in text
                else 0.123
                if "float" in text
                else "x"
            )
        )
    report: dict[str, Any] = dict.fromkeys(BenchReport.__annotations__, "a name of some length")
    report |= {"rows": tuple(BenchRow(**values) for _ in range(3)), "batch_size": 32, "threads": 2}
    report |= {"channels_last": False, "compiled": False, "amp": "bfloat16", "dtype": "float32", "batch_norm": "frozen"}
    return bench_table(SimpleNamespace(**report))  # type: ignore[arg-type]


def calibration() -> Table:
    choices = tuple(
        PieceChoice(
            name,
            100,
            Adjoint("multistep", anchors=7),
            0.0123,
            0.01,
            2.34,
            1e-3,
            1e-2,
            1.7,
            (),
            123_456_789,
            1_234_567_890,
            "reversal alone is off by 0.34: it cannot converge (contraction 1.7); anchors bring it below the tolerance",
        )
        for name in STAGES
    )
    return choice_table(
        ChosenAdjoints(choices, 0.05, 16, 64, 4, 10**9, 10**10, 2 * 10**9, 1.3, (Alternative(10**9, 0.7, 1.2),))
    )


def stages() -> Table:
    row = StageRow(
        stage="layer3",
        transition=("stride 2", "256 → 512 channels"),
        transition_parameters=1_234_567,
        blocks=24,
        steps=100,
        horizon=24.0,
        step_size=0.24,
        parameters=123_456_789,
        scheme="heun",
        form="exact",
        activation="relu",
        weights="tied+norms",
    )
    return stage_table([row] * 4, title="timm:resnetv2_50x1_bit.goog_in21k_ft_in1k")


def sweep() -> Table:
    depths = (8, 16, 32, 64, 128, 256, 512)
    return sweep_table([SweepRow(m, s, depths, tuple(1.23e-4 / n for n in depths)) for m in METHODS for s in STAGES])


def fit_costs() -> Table:
    depths = dict.fromkeys(STAGES, 100)
    costs = [PhaseCost(phase, depths, 1200, 6.1, 1_500_000_000, "backprop") for phase in ("blocks", "logits", "refine")]
    return cost_table(costs, images=8, minutes=20)


def fit_blocks() -> Table:
    after = SimpleNamespace(states={name: [0.0123] * 23 for name in STAGES})
    return block_table(SimpleNamespace(after=after))  # type: ignore[arg-type]


def fit_figures() -> Table:
    columns = [
        SimpleNamespace(
            name=name,
            images=1000,
            top1=0.8123,
            agreement=0.97,
            logit_distance=0.123,
            parameters=25_557_032,
            steps=dict.fromkeys(STAGES, 100),
            evaluations=400,
            gradient_errors={"euler": dict.fromkeys(STAGES, 0.0123), "heun": dict.fromkeys(STAGES, 0.00123)},
        )
        for name in ("source", "deepened", "fitted")
    ]
    return figures_table(columns, reference="the network before", noise=False)  # type: ignore[arg-type]


TABLES: dict[str, Callable[[], Table]] = {
    "check-grad": gradients,
    "bench": bench,
    "auto": calibration,
    "stages": stages,
    "sweep": sweep,
    "costs of a fit": fit_costs,
    "blocks of a fit": fit_blocks,
    "figures of a fit": fit_figures,
}


def rendered(what: Any, width: int) -> str:
    file = io.StringIO()
    console = _Console(file=file, width=width, force_terminal=True, color_system=None, highlight=False, markup=False)
    console.print(what)
    return file.getvalue()


def words(text: str) -> list[str]:
    return sorted(re.findall(r"[^\s─│┃━]+", text))


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
@pytest.mark.parametrize("name", TABLES)
def test_no_table_is_cut_or_wider_than_the_terminal(name: str, width: int) -> None:
    table = TABLES[name]()
    text = rendered(table, width)
    assert all(len(line.rstrip()) <= width for line in text.splitlines()), text
    assert "…" not in text.replace(" … ", " ")
    cells = " ".join(str(cell) for column in table.columns for cell in column.cells)
    missing = set(words(cells)) - set(words(text))
    assert not missing, f"{missing} of\n{text}"


@pytest.mark.parametrize("name", [name for name in TABLES if name not in ("sweep",)])
def test_a_table_has_a_row_for_every_row_at_80_columns(name: str) -> None:
    """Not one line per cell: that is for narrower ones."""
    table = TABLES[name]()
    header = str(table.columns[1].header).split()[0]
    assert rendered(table, 80).count(f"{header}:") == 0


@pytest.mark.parametrize("seed", range(40))
def test_any_table_at_any_width(seed: int) -> None:
    rng = random.Random(seed)
    columns = rng.randint(1, 9)
    table = plain_table("a title of some words, longer than a narrow terminal is wide", "and a caption")
    for _ in range(columns):
        table.add_column("a header" if rng.random() < 0.5 else "", justify=rng.choice(["left", "right"]))
    for _ in range(4):
        table.add_row(*(" ".join("w" * rng.randint(1, 12) for _ in range(rng.randint(0, 6))) for _ in range(columns)))
    cells = [str(cell) for column in table.columns for cell in column.cells]
    for width in range(30, 130, 7):
        text = rendered(table, width)
        assert all(len(line.rstrip()) <= width for line in text.splitlines()), text
        assert set(words(" ".join(cells))) <= set(words(text)) and "…" not in text


def test_where_there_is_room_a_table_stands_as_it_is() -> None:
    table = gradients()
    plain = Table(title=table.title, title_justify="left", box=table.box, pad_edge=False, padding=(0, 1))
    plain.columns, plain.rows = table.columns, table.rows
    assert rendered(table, 160) == rendered(plain, 160)


def a_step(step: int) -> Any:
    monitor = {
        "drift": dict.fromkeys(STAGES, 0.00123),
        "correction": dict.fromkeys(STAGES, 0.0456),
        "contraction": dict.fromkeys(STAGES, math.nan),
    }
    return SimpleNamespace(
        step=step, epoch=90, loss=2.345, accuracy=0.4567, images_per_second=1234.5, peak_bytes=2**34, monitor=monitor
    )


@pytest.mark.parametrize(("width", "shown"), [(60, ["loss"]), (80, ["loss", "acc"]), (200, ["img/s", "peak", "drift"])])
def test_the_progress_line_has_its_bar_its_count_and_the_time_left(width: int, shown: list[str]) -> None:
    file = io.StringIO()
    console = Console(file=file, width=width, height=30, force_terminal=True, color_system=None)
    with training(SimpleNamespace(aside=console), 12_510, 0) as show:  # type: ignore[arg-type]
        for step in (1, 6_000, 9_000):
            show(a_step(step))
    line = file.getvalue().split("\r")[-1].splitlines()[0]
    line = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line)
    assert len(line.rstrip()) <= width and "…" not in line
    assert "epoch 90" in line and "━" in line and "9000/12510" in line and line.count(":") == 4
    assert all(word in line for word in shown)


def test_the_progress_line_of_a_fit_too() -> None:
    file = io.StringIO()
    console = Console(file=file, width=80, height=30, force_terminal=True, color_system=None)
    errors = {name: torch.full((24,), 0.0123).tolist() for name in STAGES}
    with fitting(SimpleNamespace(aside=console)) as show:  # type: ignore[arg-type]
        for step in range(1, 4):
            show(FitStep("stages", step, 1200, 0.1234, errors, 2, 0.987))
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
    assert "…" not in text and "1200" in text


def test_a_line_can_be_copied_whole(monkeypatch: Any) -> None:
    """The terminal wraps it, and knows that it did; a line feed would cut a command or a path in two."""
    line = "$ resode finetune " + "/a/rather/long/path " * 10
    output = Output(json_mode=False)
    for console in (output.main, output.aside):
        monkeypatch.setattr(console, "file", io.StringIO())
        monkeypatch.setattr(console, "_force_terminal", True)
        console.width = 60
    output.show(line)
    output.note(line)
    for console in (output.main, output.aside):
        assert isinstance(console.file, io.StringIO) and line.strip() in console.file.getvalue()
