"""The commands as the project's card has them, and every command with its defaults."""

from __future__ import annotations

import csv
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import resode_cli

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def deep(run: Run, model: str) -> str:
    run("deepen", model, "--blocks", 8, "-o", "deep.safetensors")
    return "deep.safetensors"


def test_four_lines(run: Run, deep: str, tmp_path: Path, assert_ran_by) -> None:
    run("finetune", deep, "--data", "digits", "--adjoint", "heun", "-o", "run", "--max-steps", 2, "--test-images", 50)
    assert_ran_by(tmp_path / "run", "heun")
    table = run("check-grad", "run/last.safetensors").stdout
    for method in ("auto", "checkpoint", "multistep", "pc", "euler", "heun"):
        assert f" {method} " in table


@pytest.mark.parametrize("budget", [(), ("--memory-budget", "1GiB"), ("--memory-budget", "lean")])
def test_check_grad_chooses_by_default(run: Run, deep: str, budget: tuple[str, ...]) -> None:
    document = json.loads(run("check-grad", deep, "--images", 8, "--json", *budget).stdout)
    (chosen,) = document["calibrations"]
    held = [piece["adjoint"]["method"] == "backprop" for piece in chosen["choices"]]
    assert all(held) if "1GiB" in budget else not any(held)  # nothing is kept for speed alone where no budget is given
    assert document["methods"][0]["name"] == "auto"
    assert all(stage["relative_error"] < 0.04 for stage in document["methods"][0]["stages"])


def test_a_budget_of_check_grad_that_is_none(run: Run, deep: str) -> None:
    assert "error: " in run("check-grad", deep, "--memory-budget", "much", code=2).stderr


def test_a_network_of_float64_takes_the_images_of_a_data_set(run: Run, deep: str) -> None:
    model = resode_cli.load(deep, trust_source=True)
    resode_cli.save(model.double(), "f64.safetensors")
    data = ("--data", "digits", "--test-images", 20)
    run("finetune", "f64.safetensors", *data, "-o", "run", "--max-steps", 1, "--batch-size", 8)
    run("eval", "run/last.safetensors", "--data", "digits", "--images", 20)
    run("check-grad", "f64.safetensors", "--data", "digits", "--images", 4, "--adjoint", "pc")
    run("recalibrate", "f64.safetensors", *data, "--images", 8, "-o", "r.safetensors")
    fit = ("--fit", "digits", "--fit-steps", 1, "--fit-images", 16)
    run("deepen", "f64.safetensors", "--blocks", 9, *fit, "-o", "fitted.safetensors")
    fitted = resode_cli.load("fitted.safetensors", trust_source=True)
    assert {p.dtype for p in fitted.parameters()} == {torch.float64}


def test_every_parameters_gradient_is_written(run: Run, deep: str, tmp_path: Path) -> None:
    arguments = ("check-grad", deep, "--images", 4, "--adjoint", "checkpoint,pc", "--per-parameter")
    document = json.loads(run(*arguments, "points.csv", "--json").stdout)
    rows = list(csv.DictReader((tmp_path / "points.csv").read_text().splitlines()))
    names = {row["parameter"] for row in rows}
    assert names == {name for name, _ in resode_cli.load(deep, trust_source=True).net.named_parameters()}
    assert len(rows) == 2 * len(names)
    (_, pc) = document["methods"]
    errors = {row["parameter"]: float(row["relative_error"]) for row in rows if row["method"] == "pc"}
    worst = max(errors, key=lambda name: errors[name])
    assert pc["worst"][0] == {"parameter": worst, "relative_error": pytest.approx(errors[worst])}
    assert all(float(row["cosine"]) > 0.99 for row in rows if row["method"] == "checkpoint")
    assert "--per-parameter" in run(*arguments, "no/points.csv", code=2).stderr
