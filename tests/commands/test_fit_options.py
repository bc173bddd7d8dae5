"""`deepen --fit`, `tie --fit` and the report of every rewrite, as a user runs them."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from resode_cli import load
from resode_cli.app import main
from resode_cli.data import Batch
from resode_cli.errors import ResodeError
from resode_cli.training import loop
from resode_cli.training.loop import Loop

QUICK = ["--fit-steps", "3", "--fit-refine-steps", "2", "--fit-images", "40", "--fit-batch-size", "8"]
QUICK += ["--fit-lr", "4e-4", "--fit-logits-lr", "1e-4"]


@pytest.fixture
def net(tmp_path: Path, tiny_file: Path) -> Path:
    out = tmp_path / "net.safetensors"
    assert main(["convert", f"{tiny_file}:make", "--no-pretrained", "--input-size", "16", "-o", str(out)]) == 0
    return out


@pytest.fixture
def pictures(make_folder) -> Path:
    return make_folder(classes=tuple("abcde"), each=8)


def document(capsys, arguments: list[str]) -> dict:
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_deepen_fits_to_known_data_unless_that_is_declined(net: Path, pictures: Path, tmp_path: Path, capsys):
    deepen = ["deepen", str(net), "--blocks", "6", "--data", str(pictures), "--json"]
    found = document(capsys, [*deepen, *QUICK, "-o", str(tmp_path / "fitted.safetensors")])
    assert [phase["phase"] for phase in found["fit"]["phases"]] == ["blocks", "logits", "refine"]
    found = document(capsys, [*deepen, "--no-fit", "-o", str(tmp_path / "plain.safetensors")])
    assert "fit" not in found and found["before"]["images"] == found["after"]["images"]
    found = document(capsys, [*deepen, "--mode", "identity", "-o", str(tmp_path / "identity.safetensors")])
    assert "fit" not in found and found["top1_agreement"] == 1


def test_deepen_fits_saves_and_reports(net: Path, pictures: Path, tmp_path: Path, capsys):
    out = tmp_path / "deep.safetensors"
    arguments = ["deepen", str(net), "--blocks", "7", "--fit", str(pictures), "--data", str(pictures), *QUICK]
    found = document(capsys, [*arguments, "-o", str(out)])
    assert [phase["phase"] for phase in found["fit"]["phases"]] == ["blocks", "logits", "refine"]
    names = [column["name"] for column in found["figures"]]
    assert names == ["source", "unfitted", "fitted"]
    source, unfitted, fitted = found["figures"]
    assert source["agreement"] == 1.0 and source["logit_distance"] == 0.0 and source["gradient_errors"] == {}
    assert source["evaluations"] == 7 and unfitted["evaluations"] == fitted["evaluations"] == 21
    assert set(fitted["gradient_errors"]) == {"multistep", "pc", "pc, 1 correction", "euler"}
    assert fitted["gradient_errors"] != unfitted["gradient_errors"]
    assert source["top1"] == found["before"]["top1"] and fitted["top1"] == found["after"]["top1"]
    model = load(out)
    assert {stage.spec.form for stage in model.stages.values()} == {"pre"}
    assert {stage.spec.depth for stage in model.stages.values()} == {7}
    history = model.info.history[-1]
    assert (
        history["command"] == "deepen" and history["fit"]["teacher"] == str(net) and not history["fit"]["interrupted"]
    )


def test_a_fit_takes_the_minutes_that_it_is_given(net: Path, pictures: Path, tmp_path: Path, capsys):
    deepen = ["deepen", str(net), "--blocks", "6", "--data", str(pictures), "--fit-minutes", "0.03", "--no-gradients"]
    deepen += ["--fit-batch-size", "8", "--workers", "0"]
    began = time.monotonic()
    found = document(capsys, [*deepen, "-o", str(tmp_path / "one.safetensors")])
    assert time.monotonic() - began < 60
    assert found["points_lost"] == pytest.approx(100 * (found["before"]["top1"] - found["after"]["top1"]))
    assert all(phase["rate"] > 0 for phase in found["fit"]["phases"] if phase["steps"])
    assert main([*deepen, "-o", str(tmp_path / "other.safetensors")]) == 0
    assert f"{tmp_path}/other.safetensors ends " in capsys.readouterr().out.strip().splitlines()[-1]


def test_a_fit_keeps_the_horizon_and_minutes_come_in_place_of_the_steps_of_a_recipe(
    net: Path, pictures: Path, tmp_path: Path, capsys
):
    recipe = tmp_path / "steps.toml"
    recipe.write_text("[deepen]\nfit-steps = 100000\n")
    deepen = ["deepen", str(net), "--blocks", "6", "--recipe", str(recipe), "--fit", str(pictures), "--no-gradients"]
    deepen += ["--fit-minutes", "0.01", "--fit-batch-size", "8", "--workers", "0", "--horizon", "2"]
    found = document(capsys, [*deepen, "-o", str(tmp_path / "out.safetensors")])
    assert sum(phase["steps"] for phase in found["fit"]["phases"]) < 1000
    assert {stage.spec.horizon for stage in load(tmp_path / "out.safetensors").stages.values()} == {2}


def test_without_labels_the_last_line_says_how_far_the_networks_agree(net: Path, pictures: Path, tmp_path, capsys):
    out = tmp_path / "deep.safetensors"
    fit = ["--fit", str(pictures), *QUICK, "--no-gradients", "-o", str(out)]
    assert main(["deepen", str(net), "--blocks", "6", *fit]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "images held out of the fit; measure its accuracy with --data DATA" in shown
    assert "nothing is known of its accuracy" not in shown


def test_no_fit_steps_are_replication(net: Path, pictures: Path, tmp_path: Path):
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    base = ["deepen", str(net), "--blocks", "6"]
    fit = ["--fit", str(pictures), "--fit-steps", "0", "--form", "exact"]
    assert main([*base, *fit, "--no-gradients", "-o", str(one)]) == 0
    assert main([*base, "-o", str(other)]) == 0
    first, second = load(one).file_state(), load(other).file_state()
    assert first.keys() == second.keys() and all(torch.equal(t, second[k]) for k, t in first.items())


def test_tie_fits_with_norms_of_each_step(net: Path, pictures: Path, tmp_path: Path, capsys):
    out = tmp_path / "tied.safetensors"
    arguments = ["tie", str(net), "--depth-weights", "tied+norms", "--fit", str(pictures), "-o", str(out)]
    found = document(capsys, [*arguments, *QUICK[:2], *QUICK[4:], "--no-gradients"])
    assert [column["gradient_errors"] for column in found["figures"]] == [{}, {}, {}]
    assert {row["weights"] for row in found["stages"]} == {"tied+norms"}
    assert [phase["phase"] for phase in found["fit"]["phases"]] == ["stages", "logits"]
    model = load(out)
    assert {stage.spec.form for stage in model.stages.values()} == {"pre"}
    assert model.info.history[-1]["fit"]["bn"] == "batch"
    assert found["figures"][2]["parameters"] < found["figures"][0]["parameters"]


def test_every_rewrite_reports_size_cost_and_distance(net: Path, tmp_path: Path, capsys):
    out = tmp_path / "deep.safetensors"
    found = document(capsys, ["deepen", str(net), "--blocks", "6", "--gradients", "-o", str(out)])
    before, after = found["figures"]
    assert (before["evaluations"], after["evaluations"]) == (7, 18)
    assert before["parameters"] == after["parameters"]
    assert after["logit_distance"] > 0 and set(after["gradient_errors"]["pc"]) == {"layer1", "layer2", "layer3"}
    assert main(["untie", str(out), "-o", str(tmp_path / "untied.safetensors")]) == 0
    shown = capsys.readouterr().out
    assert "branch evaluations per image" in shown and "logits identical" in shown


def test_a_deepened_linear_network_reports_no_more_parameters(net: Path, tmp_path: Path, capsys):
    out = tmp_path / "linear.safetensors"
    found = document(capsys, ["deepen", str(net), "--blocks", "9", "--depth-weights", "linear", "-o", str(out)])
    assert {row["weights"] for row in found["stages"]} == {"linear"}
    assert found["figures"][0]["parameters"] == found["figures"][1]["parameters"]
    assert main(["info", str(out)]) == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["deepen", "NET", "--blocks", "6", "--fit-steps", "5"], "--fit-steps is a setting of a fit; add --fit DATA"),
        (["deepen", "NET", "--blocks", "6", "--smooth", "1"], "--smooth is a setting of a fit"),
        (["deepen", "NET", "--blocks", "6", "--fit", "DATA", "--no-fit"], "--no-fit declines it: leave out one"),
        (["deepen", "NET", "--blocks", "6", "--data", "DATA", "--no-fit", "--fit-steps", "5"], "a setting of a fit"),
        (["deepen", "NET", "--blocks", "6", "--form", "pre"], "--form changes the function"),
        (["deepen", "NET", "--blocks", "6", "--fit", "nowhere/"], "data folder 'nowhere/' does not exist"),
        (["deepen", "NET", "--blocks", "6", "--fit", "DATA", "--mode", "identity"], "not from --mode identity"),
        (["deepen", "NET", "--blocks", "2", "--fit", "DATA"], "has 3 steps already"),
        (["deepen", "NET", "--blocks", "6", "--fit", "DATA", "--fit-phases", "block"], "unknown fit phases 'block'"),
        (["deepen", "NET", "--blocks", "6", "--fit", "DATA", "--form", "bogus"], "unknown form 'bogus'"),
        (["deepen", "NET", "--blocks", "6", "--depth-weights", "lin"], "unknown depth weights 'lin'"),
        (["deepen", "NET", "--blocks", "6", "--fit", "DATA", "--teacher", "cifar:resnet20"], "brings no weights"),
        (["tie", "NET", "--depth-weights", "linear"], "unknown depth weights 'linear'"),
        (["tie", "NET", "--form", "bogus"], "--form changes the function"),
        (["tie", "NET", "--fit", "DATA", "--form", "bogus"], "unknown form 'bogus'"),
        (["tie", "NET", "--fit", "DATA", "--fit-phases", "refine"], "'logits' already runs at full depth"),
        (
            ["tie", "NET", "--fit", "DATA", "--fit-phases", "logits", "--fit-lr", "1e-3"],
            "--fit-lr is read in blocks and stages; --fit-phases has logits",
        ),
        (
            ["deepen", "NET", "--blocks", "6", "--fit", "DATA", "--fit-phases", "blocks", "--fit-refine-steps", "5"],
            "--fit-refine-steps is read in refine; --fit-phases has blocks",
        ),
        (
            ["tie", "NET", "--fit", "DATA", "--fit-minutes", "5", "--fit-steps", "5"],
            "--fit-minutes and --fit-steps exclude each other",
        ),
        (["tie", "NET", "--fit", "DATA", "--teacher", "gone.safetensors"], "'gone.safetensors' does not exist"),
        (["finetune", "NET", "--data", "DATA", "--distill", "0.3"], "--distill is a setting of the teacher"),
        (["finetune", "NET", "--data", "DATA", "--teacher", "NET", "--distill", "2"], "--distill 2: must be from 0"),
    ],
)
def test_a_mistake_is_one_line(net: Path, pictures: Path, tmp_path: Path, capsys, arguments, message):
    given = [{"NET": str(net), "DATA": str(pictures)}.get(a, a) for a in arguments]
    out = tmp_path / ("out" if given[0] == "finetune" else "out.safetensors")
    capsys.readouterr()
    assert main([*given, "-o", str(out)]) != 0
    error = capsys.readouterr().err.strip()
    assert message in error and error.count("\n") == 0 and not out.exists()


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_fitted_so_far(net: Path, pictures: Path, tmp_path: Path, start):
    out = tmp_path / "deep.safetensors"
    arguments = ["deepen", str(net), "--blocks", "8", "--fit", str(pictures), "-o", str(out)]
    arguments += [
        "--fit-steps",
        "100000",
        "--fit-images",
        "40",
        "--fit-batch-size",
        "8",
        "--no-gradients",
        "--trust-source",
    ]
    process = start(*arguments)
    assert any(line.startswith("blocks 20/") for line in iter(process.stderr.readline, ""))
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(60) == 130
    assert "holds what was fitted so far" in rest and "Traceback" not in rest
    model = load(out)
    assert {stage.spec.depth for stage in model.stages.values()} == {8}
    assert model.info.history[-1]["fit"]["interrupted"]


@pytest.mark.parametrize("own_input", [False, True])
def test_a_fit_that_fails_says_what_its_file_holds(own_input, net: Path, pictures: Path, tmp_path, monkeypatch, capsys):
    """The first phase has ended, and is written; the second meets an image that cannot be read."""
    out = net if own_input else tmp_path / "deep.safetensors"
    before = net.read_bytes()
    run = Loop.run

    def failing(self: Loop, *arguments: Any) -> str:
        if self.settings.lr == 2e-5:
            raise ResodeError("a process that reads images died")
        return run(self, *arguments)

    monkeypatch.setattr(Loop, "run", failing)
    command = ["deepen", str(net), "--trust-source", "--blocks", "6", "--fit", str(pictures), *QUICK]
    command += ["--fit-logits-lr", "2e-5", "--no-gradients", "--force"]
    assert main([*command, "-o", str(out)]) == 1
    written = tmp_path / "net.unfinished.safetensors" if own_input else out
    error = capsys.readouterr().err
    assert f"{written} holds what was fitted so far" in " ".join(error.split())
    assert load(written, trust_source=True).info.history[-1]["fit"]["interrupted"]
    assert not own_input or net.read_bytes() == before


def test_a_signal_while_a_fit_waits_for_images_keeps_what_is_fitted(net: Path, pictures: Path, tmp_path, monkeypatch):
    """Nobody knows when they come, and no step is halfway."""
    out = tmp_path / "deep.safetensors"
    batches = loop.training_batches

    def waiting(*arguments: Any, **settings: Any) -> Iterator[Batch]:
        for number, batch in enumerate(batches(*arguments, **settings)):
            if number == 2:
                signal.raise_signal(signal.SIGTERM)
                raise AssertionError("the signal was not heeded")
            yield batch

    monkeypatch.setattr("resode_cli.fitting.fit.training_batches", waiting)
    command = ["deepen", str(net), "--trust-source", "--blocks", "6", "--fit", str(pictures), *QUICK]
    assert main([*command, "--no-gradients", "-o", str(out)]) == 143
    model = load(out, trust_source=True)
    assert model.info.history[-1]["fit"]["interrupted"]
    assert {stage.spec.depth for stage in model.stages.values()} == {6}


def test_a_fit_whose_weights_become_no_numbers_writes_nothing(net: Path, pictures: Path, tmp_path: Path, capsys):
    out = tmp_path / "deep.safetensors"
    command = ["deepen", str(net), "--trust-source", "--blocks", "6", "--fit", str(pictures), *QUICK]
    assert main([*command, "--fit-lr", "1e38", "-o", str(out)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and "unexpected" not in error and not out.exists()


def test_a_signal_at_the_very_end_of_a_fit_leaves_a_whole_file(
    net: Path, pictures: Path, tmp_path, monkeypatch, capsys
):
    """It is only noted while the last phase is judged and saved, and ends the command once the file stands."""
    out = tmp_path / "deep.safetensors"

    def signalled(phase: Any) -> str:
        if phase.phase == "refine":
            signal.raise_signal(signal.SIGTERM)
        return phase.phase

    monkeypatch.setattr("resode_cli.reports.fit.phase_line", signalled)
    command = ["deepen", str(net), "--trust-source", "--blocks", "6", "--fit", str(pictures), *QUICK]
    assert main([*command, "--no-gradients", "-o", str(out)]) == 143
    assert "is whole, and was not measured" in " ".join(capsys.readouterr().err.split())
    assert not load(out, trust_source=True).info.history[-1]["fit"]["interrupted"]
