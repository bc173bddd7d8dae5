"""A horizon of one's own: x_{n+1} = x_n + (T/N) r_n(x_n)."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor

import resode_cli as resode
from resode_cli.app import main
from resode_cli.errors import UsageError
from resode_cli.network.model import OdeResNet
from resode_cli.network.specs import as_horizon

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize("horizon", [Fraction(1), Fraction(1, 2), Fraction(5)])
def test_steps_are_of_the_horizons_length(horizon: Fraction, build_tiny, images: Tensor, tmp_path: Path) -> None:
    model: OdeResNet = build_tiny(horizon=horizon, form="pre")
    stage = model.stages["layer1"].eval()
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        state = x
        for residual in stage.residuals():  # three untied blocks
            state = state + float(horizon) / 3 * residual(state)
        torch.testing.assert_close(stage(x), torch.relu(state))
        resode.save(model, tmp_path / "m.safetensors")
        loaded = resode.load(tmp_path / "m.safetensors", trust_source=True)
        assert torch.equal(loaded(images), model.eval()(images))
    assert {s.spec.horizon for s in resode.deepen(loaded, 7).stages.values()} == {horizon}


def test_the_sources_own_horizon_is_the_sources_function(build_tiny, images: Tensor) -> None:
    """Steps of 1: what every stage has by itself, one by one."""
    as_it_was: OdeResNet = build_tiny()
    for name, stage in as_it_was.stages.items():
        given: OdeResNet = build_tiny(horizon=Fraction(stage.spec.depth))
        assert given.stages[name].spec == stage.spec
    with torch.no_grad():
        other = build_tiny(horizon=Fraction(1)).eval()(images)
        assert not torch.allclose(other, as_it_was.eval()(images), rtol=0.01)


@pytest.mark.parametrize(("text", "value"), [("1", 1), ("0.5", Fraction(1, 2)), ("1/3", Fraction(1, 3)), (" 2 ", 2)])
def test_a_horizon_is_a_number(text: str, value: Fraction) -> None:
    assert as_horizon(text) == value


@pytest.mark.parametrize("text", ["", "0", "0/1", "-1", "1/0", "1e9", "inf", "nan", "one", "1/2/3", "9" * 40, "²"])
def test_what_is_no_horizon(text: str) -> None:
    with pytest.raises(UsageError, match="must be a number above 0"):
        as_horizon(text)


def test_commands_take_a_horizon_and_record_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, code: int = 0) -> str:
        assert main([str(argument) for argument in arguments]) == code
        return capsys.readouterr().out

    document = json.loads(
        run("convert", "cifar:resnet20", "--no-pretrained", "--horizon", 1, "-o", "c.safetensors", "--json")
    )
    assert not document["verified"]["function_kept"]
    assert [row["step_size"] for row in document["stages"]] == pytest.approx([1 / 3, 1 / 2, 1 / 2])
    run("deepen", "c.safetensors", "--blocks", 6, "--stage", 3, "--horizon", "1/2", "-o", "d.safetensors")
    run("tie", "d.safetensors", "--stage", "layer1", "--horizon", 2, "-o", "t.safetensors")
    tied = resode.load("t.safetensors")
    assert [stage.spec.horizon for stage in tied.stages.values()] == [2, 1, Fraction(1, 2)]
    assert [entry.get("horizon") for entry in tied.info.history] == ["1", "1/2", "2"]
    run("deepen", "c.safetensors", "--blocks", 6, "--mode", "identity", "--horizon", 2, "-o", "i.safetensors", code=2)
    run("convert", "cifar:resnet20", "--no-pretrained", "--horizon", "long", "-o", "i.safetensors", code=2)
    assert not Path("i.safetensors").exists()
