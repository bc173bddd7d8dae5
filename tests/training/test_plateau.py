"""--schedule plateau: when the rate falls, that a resumed run repeats it, and what cannot be."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import run
from torch.optim.lr_scheduler import ReduceLROnPlateau

from resode_cli.app import main
from resode_cli.files.model_file import read_tensors, write_tensors
from resode_cli.training.best import check_evaluations
from resode_cli.training.plateau import Plateau
from resode_cli.training.run_folder import load_state
from resode_cli.training.settings import Settings

# An evaluation every three steps; so small a rate that an accuracy of eight images hardly moves.
PLATEAU = ["--schedule", "plateau", "--plateau-evaluations", "2", "--plateau-factor", "0.5", "--epochs", "8"]
SLOW = [*PLATEAU, "--lr", "0.004", "--log-every", "1"]


def rates(folder: str) -> list[float]:
    with Path(folder, "log.csv").open(newline="") as file:
        return [float(row["lr"]) for row in csv.DictReader(file) if row["split"] == "train"]


def of(scores: list[float], **more: Any) -> list[float]:
    """The share of the rate after each evaluation."""
    plateau = Plateau(Settings(schedule="plateau", **more), {})
    shares = []
    for step, score in enumerate(scores, start=1):
        plateau.see(score, step)
        shares.append(plateau.share)
    return shares


def test_the_rate_falls_after_so_many_evaluations_without_a_better_one() -> None:
    scores = [-3.0, -2.0, -2.0, -2.5, -1.9, -1.9, -1.9, -1.9, -1.9]
    found = of(scores, plateau_evaluations=2, plateau_factor=0.5)
    assert found == [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.125]
    assert of(scores, plateau_evaluations=2, plateau_factor=0.5, lr=1.0, min_lr=0.3)[-1] == 0.3
    assert of(scores, plateau_evaluations=2, plateau_factor=0.5, warmup=4)[:7] == [1] * 6 + [0.5], (
        "not during the warmup"
    )


def test_it_is_torchs_plateau() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = ReduceLROnPlateau(
        optimizer, mode="max", factor=0.2, patience=2, threshold=0.0, threshold_mode="abs", eps=0
    )
    scores = [float(v) for v in torch.rand(40, generator=torch.Generator().manual_seed(0))]
    expected = []
    for score in scores:
        theirs.step(score)
        expected.append(optimizer.param_groups[0]["lr"])
    assert of(scores, plateau_evaluations=3, plateau_factor=0.2) == expected and expected[-1] < 1


def test_what_it_has_seen_goes_on_from_a_state_of_json() -> None:
    settings = Settings(schedule="plateau", plateau_evaluations=2)
    whole, part = Plateau(settings, {}), Plateau(settings, {})
    for step, score in enumerate([0.5, 0.4, 0.45, 0.3, 0.6, 0.6], start=1):
        whole.see(score, step)
        part.see(score, step)
        part = Plateau(settings, json.loads(json.dumps(part.state)))
        assert part.share == whole.share and part.state == whole.state
    assert whole.share < 1


def test_a_run_falls_says_so_and_resumes_to_the_bit(here: Path, capsys: Any) -> None:
    more = [*SLOW, "--layer-decay", "0.5", "--save-every", "5"]
    assert main(run("-o", "whole", *more, steps=24)) == 0
    assert "nothing better in 2 evaluations, so the learning rate falls to 0.002" in capsys.readouterr().err
    found = rates("whole")
    assert found[0] == 0.004 and found[-1] <= 0.002 and found == sorted(found, reverse=True)
    # At evaluations: a shorter run is measured at its end, which anywhere else would be one more.
    assert main(run("-o", "parts", *more, steps=9)) == 0
    for steps in (15, 24):
        assert main(run("-o", "parts", "--resume", steps=steps)) == 0
    for name in ("state", "last"):
        a, b = (load_file(f"{folder}/{name}.safetensors") for folder in ("whole", "parts"))
        assert a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())
    one, other = (load_state(Path(folder)).progress["plateau"] for folder in ("whole", "parts"))
    assert one == other and one["share"] < 1


def test_a_run_from_before_the_schedule_goes_on_with_it(here: Path) -> None:
    path = here / "run" / "state.safetensors"
    tensors, metadata = read_tensors(path)
    del metadata["run"]["progress"]["plateau"]
    write_tensors(path, tensors, metadata)
    assert main(run("-o", "run", "--resume", "--schedule", "plateau", "--epochs", "4", steps=9)) == 0
    assert load_state(here / "run").progress["plateau"]["share"] == 1


@pytest.mark.parametrize("state", [{"share": 0.0}, {"share": "1"}, {"waited": 1.5}, {"best": None}, {"odd": 1}])
def test_a_state_that_is_none_is_refused(state: dict[str, Any], here: Path, capsys: Any) -> None:
    path = here / "run" / "state.safetensors"
    tensors, metadata = read_tensors(path)
    metadata["run"]["progress"]["plateau"] = state
    write_tensors(path, tensors, metadata)
    assert main(run("-o", "run", "--resume", steps=4)) == 1
    assert "progress: plateau" in capsys.readouterr().err


def test_a_run_without_evaluations_before_its_end_is_refused(here: Path, capsys: Any) -> None:
    assert main(run("-o", "new", "--schedule", "plateau", steps=3)) == 2
    assert "--schedule plateau goes by evaluations, and 3 steps with one every 3 have none" in capsys.readouterr().err
    assert not (here / "new").exists()
    assert main(run("-o", "new", "--schedule", "plateau", "--dry-run", steps=3)) == 2
    assert main(run("-o", "new", "--schedule", "plateau", "--epochs", "2", steps=4)) == 0
    assert "--plateau-evaluations 3 never lowers the rate" in capsys.readouterr().err


def test_a_patience_that_ends_nothing_is_told_of(here: Path, capsys: Any) -> None:
    assert main(run("-o", "new", "--patience", "2", "--epochs", "2", steps=6)) == 0
    assert "note: --patience 2 ends nothing, as the run has 1 evaluation before its end" in capsys.readouterr().err
    assert not check_evaluations(Settings(patience=2), 3, 7)


@pytest.mark.parametrize("more", [["--plateau-evaluations", "2"], ["--plateau-factor", "0.5"]])
def test_settings_of_another_schedule_are_refused(more: list[str], here: Path, capsys: Any) -> None:
    assert main(run("-o", "new", *more)) == 2
    assert f"{more[0]}: of --schedule plateau, and --schedule cosine looks at no evaluation" in capsys.readouterr().err
