"""The benchmark measures what it says, against baselines that are what a user would write."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from resode_cli.app import main
from resode_cli.bench.results import BenchReport, BenchRow, on_frontier
from resode_cli.bench.run import bench, fresh_process_growth, largest_fitting
from resode_cli.bench.stage_shape import StageShape
from resode_cli.bench.workload import (
    BACKPROP,
    BASELINES,
    TorchCheckpoint,
    Trial,
    Workload,
    method_record,
    read_method,
)
from resode_cli.errors import ResodeError, UsageError
from resode_cli.files import model_file
from resode_cli.network.model import OdeResNet
from resode_cli.network.stage import OdeStage
from resode_cli.ode import Adjoint
from resode_cli.reports.bench import bench_csv, bench_json, bench_table

SHAPE = StageShape(4, 8, 8)
STATE = 2 * 4 * 8 * 8 * 4  # bytes, batch 2
EVERY, ROOT = TorchCheckpoint("step"), TorchCheckpoint("root")
CHOSEN = [Adjoint("multistep"), Adjoint("pc", 4), Adjoint("checkpoint")]
NAMES = ["backprop", "torch checkpoint", "torch checkpoint √N", "multistep", "pc, anchors 4", "checkpoint"]


@pytest.fixture
def workload() -> Workload:
    return Workload(shape=SHAPE, batch_size=2)


@pytest.fixture
def peaks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int | None]]:
    """Stand in for the fresh processes, each of which imports torch; what was asked of them."""
    asked: list[tuple[str, int | None]] = []

    def growth(workload: Workload, method, depth: int | None) -> int:
        asked.append((method.label, depth))
        return 1000 * len(asked)

    monkeypatch.setattr("resode_cli.bench.run.fresh_process_growth", growth)
    return asked


@pytest.fixture
def report(workload: Workload, peaks) -> BenchReport:
    return bench(workload, CHOSEN, depths=[4, 8], repeats=1)


def counted(workload: Workload, method, depth: int) -> tuple[int, float]:
    """Bytes kept and evaluations per step."""
    trial = Trial(workload, depth)
    trial.use(method)
    counted = trial.counted_step()
    return counted.kept, counted.evaluations


# rows


def test_every_method_has_a_whole_row_at_every_depth(report: BenchReport, peaks):
    assert [(row.depth, row.method) for row in report.rows] == [(d, name) for d in (4, 8) for name in NAMES]
    for i, row in enumerate(report.rows, start=1):
        assert row.status == "ok" and row.seconds > 0
        assert row.images_per_second == pytest.approx(2 / row.seconds)
        assert row.peak_bytes == 1000 * i and row.bytes_kept > 0
        assert row.error_against == "backprop"
    assert peaks == [(name, d) for d in (4, 8) for name in NAMES]
    assert [row.ratio_to_backprop for row in report.rows if row.method == "backprop"] == [1.0, 1.0]


def test_exact_methods_have_no_error_and_the_others_little(report: BenchReport):
    for row in report.rows:
        if row.method == "backprop":
            assert row.relative_error == 0.0
        elif "checkpoint" in row.method:
            assert row.relative_error < 1e-5
        else:
            assert 1e-6 < row.relative_error < 0.5


def test_evaluations_are_counted(report: BenchReport):
    found = {(row.method, row.depth): row.evaluations_per_step for row in report.rows}
    for n in (4, 8):
        assert found["backprop", n] == 0.0
        assert found["torch checkpoint", n] == 1.0
        assert found["multistep", n] == pytest.approx(1 + 1 / n)  # one run of equal weights
        assert found["checkpoint", n] == 1.0
    # √N segments, the last of which is not run again: 2 of 2 steps at 4, 3 of 2, 2 and 4 steps at 8.
    assert found["torch checkpoint √N", 4] == 0.5 and found["torch checkpoint √N", 8] == 0.5


def test_reversing_evaluates_twice(workload: Workload):
    assert counted(workload, Adjoint("pc"), 6)[1] == 2.0


# memory


@pytest.mark.parametrize("weights", ["tied", "untied", "smooth"])
@pytest.mark.parametrize("name", ["multistep", "pc"])
def test_bytes_kept_by_a_reversal_do_not_depend_on_depth(name: str, weights: str, workload: Workload):
    workload = replace(workload, shape=replace(SHAPE, weights=weights))
    kept = {counted(workload, Adjoint(name), depth)[0] for depth in (4, 8, 16)}
    assert kept == {2 * STATE}


def test_bytes_kept_by_backprop_grow_linearly(workload: Workload):
    at_4, at_8, at_12 = (counted(workload, BACKPROP, depth)[0] for depth in (4, 8, 12))
    assert at_12 - at_8 == pytest.approx(at_8 - at_4, abs=100)
    assert at_8 - at_4 >= 4 * 3 * STATE  # a block of two convolutions keeps more than its input


@pytest.mark.parametrize("depth", [4, 9])
def test_torch_checkpoint_keeps_a_state_per_step(depth: int, workload: Workload):
    kept, _ = counted(workload, EVERY, depth)
    assert depth * STATE <= kept <= (depth + 1) * STATE + 100  # and the output, which the loss keeps


def test_torch_checkpoint_in_segments_keeps_fewer(workload: Workload):
    kept = [counted(workload, method, 64)[0] for method in (BACKPROP, EVERY, ROOT)]
    assert kept[2] < kept[1] < kept[0]


@pytest.mark.slow
def test_the_peak_of_a_fresh_process_is_larger_by_backprop():
    workload = Workload(shape=StageShape(16, 32, 32), batch_size=16)  # a state is 1 MiB
    backprop, multistep = (fresh_process_growth(workload, method, 32) for method in (BACKPROP, Adjoint("multistep")))
    assert backprop > 32 * 3 * 2**20
    assert multistep < backprop / 4


@pytest.mark.slow
def test_a_fresh_process_that_fails_says_why_in_a_line(tmp_path: Path):
    with pytest.raises(ResodeError, match="process measuring pc failed: UsageError: .*does not exist$"):
        fresh_process_growth(Workload(model=str(tmp_path / "gone.safetensors")), Adjoint("pc"), None)


# what is measured


@pytest.mark.parametrize("method", [*BASELINES, Adjoint("pc", 3, 2), Adjoint("checkpoint", snapshots=2)])
def test_a_fresh_process_is_told_the_same(method, workload: Workload):
    assert read_method(json.loads(json.dumps(method_record(method)))) == method
    assert Workload.read(json.loads(json.dumps(workload.record()))) == workload


@pytest.mark.parametrize("weights, blocks", [("tied", 1), ("untied", 6), ("smooth", 6)])
@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_a_stage_is_what_its_shape_says(block: str, weights: str, blocks: int):
    stage = StageShape(8, 6, 5, block, weights).build(6, seed=0)
    assert (stage.spec.depth, stage.spec.horizon, len(stage.blocks)) == (6, 1, blocks)
    assert stage(torch.randn(2, 8, 6, 5)).shape == (2, 8, 6, 5)
    again = StageShape(8, 6, 5, block, weights).build(6, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(stage.parameters(), again.parameters(), strict=True))


def test_smooth_weights_move_less_from_step_to_step_the_deeper_the_stage():
    def largest_move(stage: OdeStage) -> float:
        weights = [block[2].weight for block in stage.blocks]
        return max((b - a).norm().item() / a.norm().item() for a, b in zip(weights, weights[1:], strict=False))

    shape = replace(SHAPE, weights="smooth")
    assert largest_move(shape.build(16, seed=0)) == pytest.approx(largest_move(shape.build(8, seed=0)) / 2, rel=0.1)
    assert largest_move(replace(SHAPE, weights="untied").build(8, seed=0)) > 0.5


@pytest.mark.parametrize("method", [EVERY, ROOT])
def test_the_torch_baseline_computes_the_stages_own_function(method: TorchCheckpoint, workload: Workload):
    trial = Trial(workload, 5)
    trial.use(BACKPROP)
    trial.reset()
    expected = trial.loss()
    trial.use(method)
    trial.reset()
    assert torch.equal(trial.loss(), expected)


def test_a_model_is_measured_whole_and_its_file_left_alone(tiny: OdeResNet, tmp_path: Path, peaks):
    path = tmp_path / "net.safetensors"
    model_file.save(tiny, path)
    before = path.read_bytes()
    workload = Workload(model=str(path), batch_size=4, bn="frozen")
    own = bench(workload, CHOSEN, depths=None, repeats=1)
    deep = bench(workload, CHOSEN, depths=[6], repeats=1)
    assert {row.depth for row in own.rows} == {3} and {row.depth for row in deep.rows} == {6}
    for report in (own, deep):
        errors = {row.method: row.relative_error or 0.0 for row in report.rows}
        assert max(errors["torch checkpoint"], errors["torch checkpoint √N"], errors["checkpoint"]) < 1e-5
        assert errors["multistep"] > 1e-6
        evaluations = {row.method: row.evaluations_per_step for row in report.rows}
        assert evaluations["torch checkpoint"] == evaluations["checkpoint"] == 1.0
    assert path.read_bytes() == before
    assert peaks[0] == ("backprop", None) and peaks[-1] == ("checkpoint", 6)


def test_every_method_starts_from_the_same_statistics(workload: Workload):
    trial = Trial(workload, 4)
    start = [buffer.clone() for buffer in trial.module.buffers()]
    trial.use(BACKPROP)
    trial.step()
    assert any(not torch.equal(a, b) for a, b in zip(start, trial.module.buffers(), strict=True))
    trial.reset()
    assert all(torch.equal(a, b) for a, b in zip(start, trial.module.buffers(), strict=True))


def test_reduced_precision_is_measured(workload: Workload, peaks):
    report = bench(replace(workload, amp="bf16", channels_last=True), CHOSEN, depths=[4], repeats=1)
    assert report.amp == "bf16" and all(math.isfinite(row.relative_error) for row in report.rows)


@pytest.mark.parametrize("limit", [0, 1, 3, 64, 100, 1000])
def test_the_largest_batch_is_found_to_within_two_percent(limit: int):
    tried: list[int] = []

    def fits(images: int) -> bool:
        tried.append(images)
        return images <= limit

    found = largest_fitting(fits, 64)
    assert found <= limit and limit - found <= max(0, limit // 50)
    assert len(tried) < 20


# frontier


def row(method: str, error: float | None, peak: int | None, seconds: float | None, depth: int = 8) -> BenchRow:
    return BenchRow(method, depth, seconds=seconds, peak_bytes=peak, relative_error=error)


def frontier(*rows: BenchRow) -> list[str]:
    return [rows[i].method for i in sorted(on_frontier(rows))]


def test_a_row_that_another_beats_is_not_on_the_frontier():
    fast, small, worse = row("fast", 0.0, 1000, 1.0), row("small", 0.1, 100, 2.0), row("worse", 0.2, 1000, 1.5)
    assert frontier(fast, small, worse) == ["fast", "small"]


def test_rounding_and_noise_beat_nobody():
    a = row("a", 0.0, 1000, 1.0)
    assert frontier(a, row("b", 9e-6, 1020, 1.02)) == ["a", "b"]
    assert frontier(a, row("b", 2e-5, 1000, 1.0)) == ["a"]
    assert frontier(a, row("b", 0.0, 1000, 1.1)) == ["a"]


def test_depths_are_judged_apart():
    assert frontier(row("a", 0.0, 10, 1.0), row("b", 0.0, 20, 2.0, depth=16)) == ["a", "b"]


def test_what_did_not_run_or_is_not_finite_is_on_no_frontier():
    lost = replace(row("lost", None, None, None), status="out of memory")
    assert frontier(row("a", math.nan, 10, 1.0), row("b", 0.0, 10, 1.0), lost) == ["b"]


# reports


def test_csv_and_json_agree(report: BenchReport):
    document = json.loads(json.dumps(bench_json(report), allow_nan=False))
    table = list(csv.DictReader(io.StringIO(bench_csv(report))))
    assert len(table) == len(document["rows"]) == 12
    for line, record in zip(table, document["rows"], strict=True):
        assert line == {name: "" if value is None else str(value) for name, value in record.items()}
    assert document["batch_size"] == 2 and document["device"] == "cpu" and document["torch"] == torch.__version__
    assert document["what"] == str(SHAPE)


def test_a_row_without_figures_can_be_shown(report: BenchReport):
    lost = replace(report, rows=(*report.rows, BenchRow("pc", 8, "out of memory")))
    assert bench_table(lost).row_count == 13
    assert json.loads(json.dumps(bench_json(lost)))["rows"][-1]["seconds"] is None


# command


def test_the_command_writes_what_it_is_asked_for(tmp_path: Path, capsys, peaks):
    table, plot = tmp_path / "rows.csv", tmp_path / "plot.png"
    arguments = ["bench", "--stage-shape", "4,8,8", "--depths", "8,4", "-b", "2", "--repeats", "1"]
    arguments += ["--adjoint", "multistep,pc:anchors=2,checkpoint:snapshots=3", "--device", "cpu"]
    assert main([*arguments, "--csv", str(table), "--plot", str(plot), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [r["method"] for r in document["rows"]][3:6] == ["multistep", "pc, anchors 2", "checkpoint, 3 snapshots"]
    assert [r["depth"] for r in document["rows"]] == [4] * 6 + [8] * 6
    assert any(r["frontier"] for r in document["rows"])
    assert len(table.read_text().splitlines()) == 13 and plot.stat().st_size > 1000
    assert sorted(os.listdir(tmp_path)) == ["plot.png", "rows.csv"]


SHAPED = ["--stage-shape", "4,8,8", "--device", "cpu"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "give either a model file or --stage-shape"),
        (["net.safetensors", *SHAPED], "not both"),
        (["--stage-shape", "4,8"], "write channels, height and width"),
        (["--stage-shape", "4,8,0"], "must be 1 or more"),
        (["--stage-shape", "6,8,8", "--block", "bottleneck"], "divisible by 4"),
        ([*SHAPED, "--weights", "tidy"], "unknown weights 'tidy'"),
        ([*SHAPED, "--depths", "4,x"], "write one or more depths"),
        ([*SHAPED, "--adjoint", "multistp"], "did you mean multistep"),
        ([*SHAPED, "--adjoint", "heun"], "retraces the heun forward rule"),
        ([*SHAPED, "--adjoint", "pc:anchor=3"], "did you mean anchors"),
        ([*SHAPED, "--adjoint", "pc:anchors=x"], "write a number"),
        ([*SHAPED, "--adjoint", "pc,pc"], "is there twice"),
        ([*SHAPED, "--adjoint", "pc", "--snapshots", "3"], "none of"),
        ([*SHAPED, "--adjoint", "checkpoint", "--corrections", "1"], "none of"),
        ([*SHAPED, "--largest-batch"], "needs a GPU"),
        ([*SHAPED, "--repeats", "0"], "--repeats 0"),
        ([*SHAPED, "--batch-size", "0"], "--batch-size 0"),
        ([*SHAPED, "--input-size", "32"], "goes with a model file"),
        ([*SHAPED, "--bn", "eval"], "unknown bn 'eval'"),
        ([*SHAPED, "--csv", "/nowhere/rows.csv"], "--csv '/nowhere/rows.csv'"),
        ([*SHAPED, "--plot", "plot.gif"], "must end in .png"),
        (["net.safetensors", "--weights", "tied"], "goes with --stage-shape"),
        (["net.safetensors"], "does not exist"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: list[str], words: str, capsys):
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_a_depth_below_a_stages_own_is_refused(tiny: OdeResNet, tmp_path: Path, capsys):
    path = tmp_path / "net.safetensors"
    model_file.save(tiny, path)
    assert main(["bench", str(path), "--depths", "2,8", "--device", "cpu"]) == 2
    assert "--depths 2: stage layer1 has 3 steps already" in capsys.readouterr().err


def test_backprop_in_the_list_is_the_row_that_is_there_anyway(workload: Workload, peaks):
    report = bench(workload, [BACKPROP], depths=[4], repeats=1)
    assert [r.method for r in report.rows] == NAMES[:3]


def test_a_stage_needs_depths(workload: Workload):
    with pytest.raises(UsageError, match="needs --depths"):
        bench(workload, CHOSEN, depths=None)
