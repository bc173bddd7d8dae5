"""`bench --simulate`: what methods would hold, where nothing is run."""

from __future__ import annotations

import json

import pytest

from resode_cli.app import main
from resode_cli.files import model_file
from resode_cli.network.model import OdeResNet


@pytest.fixture
def here(pico: OdeResNet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model_file.save(pico, tmp_path / "m.safetensors")
    return ["bench", "m.safetensors", "--trust-source", "-b", "16"]


def rows(capsys) -> dict[tuple[str, int], dict[str, float]]:
    return {(row["method"], row["depth"]): row for row in json.loads(capsys.readouterr().out)["rows"]}


def test_backprop_grows_with_depth_and_a_reversal_does_not(here, capsys):
    simulate = ["--simulate", "cuda", "--depths", "8,32", "--adjoint", "multistep", "--amp", "bf16", "--json"]
    assert main([*here, *simulate]) == 0
    found = rows(capsys)
    kept = {key: row["bytes_kept"] for key, row in found.items()}
    assert kept["backprop", 32] > 3 * kept["backprop", 8]
    growth = {method: kept[method, 32] - kept[method, 8] for method in ("backprop", "multistep")}
    assert growth["multistep"] < 0.1 * growth["backprop"]  # a few numbers of each state, to see that it repeats
    assert found["backprop", 8]["time"] == 1 < found["multistep", 8]["time"]
    assert all(row["growth"] < row["peak_bytes"] for row in found.values())


def test_slices_are_for_networks_that_mix_no_images(here, capsys):
    sliced = ["--simulate", "cpu", "--adjoint", "checkpoint:slices=4"]
    assert main([*here, *sliced, "--bn", "frozen"]) == 0
    assert "nothing was run" in capsys.readouterr().out
    for mode in ("batch", "sync"):
        assert main([*here, *sliced, "--bn", mode]) == 1
        assert "cannot be run in slices" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--simulate", "cud"], "did you mean cuda"),
        (["--simulate", "cuda", "--rivals"], "--rivals is for what is measured"),
        (["--simulate", "cuda", "--depths", "1"], "--depths 1: "),
        (["--simulate", "cuda", "--adjoint", "heun"], "heun"),
    ],
)
def test_what_cannot_be_simulated_is_refused(arguments, message, here, capsys):
    assert main([*here, *arguments]) in (1, 2)
    assert message in capsys.readouterr().err


def test_a_stage_by_itself_is_measured(capsys):
    assert main(["bench", "--stage-shape", "4,8,8", "--simulate", "cuda"]) == 2
    assert "--simulate needs a model file" in capsys.readouterr().err
