"""Numbers out of range are refused by the name of their option, before any work is done."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from resode_cli.app import app, main
from resode_cli.errors import UsageError
from resode_cli.fitting.settings import FitSettings
from resode_cli.options import option_of
from resode_cli.quantities import COUNT, DECAYING, FINITE, POSITIVE, SEED, Range
from resode_cli.training.settings import Settings

# What each command needs besides, so that nothing but the number is wrong; no file of these exists.
NEEDED = {
    "convert": ["cifar:resnet20", "--no-pretrained", "-o", "out.safetensors"],
    "tie": ["none.safetensors", "-o", "out.safetensors", "--fit", "digits"],
    "untie": ["none.safetensors", "-o", "out.safetensors"],
    "deepen": ["none.safetensors", "-o", "out.safetensors", "--fit", "digits", "--blocks", "2"],
    "recalibrate": ["none.safetensors", "-o", "out.safetensors", "--data", "digits"],
    "check-grad": ["none.safetensors"],
    "bench": ["none.safetensors"],
    "finetune": ["none.safetensors", "--data", "digits", "-o", "run", "--teacher", "none.safetensors"],
    "eval": ["none.safetensors", "--data", "digits"],
    "predict": ["none.safetensors", "none.png"],
    "report": ["none"],
    "export": ["none.safetensors", "-o", "out.onnx"],
}
NEEDS = {"--snapshots": ["--adjoint", "checkpoint"], "--corrections": ["--adjoint", "pc"]}


def numeric_options() -> list[tuple[str, str, type]]:
    """Command, flag and type of every option that takes a number, from the commands' own signatures."""
    found = []
    for command in app.registered_commands:
        assert command.callback is not None
        for name, hint in get_type_hints(command.callback, include_extras=True).items():
            if name == "return":
                continue
            kind, *marks = get_args(hint) or (hint,)
            kinds = set(get_args(kind)) or {kind}
            # Typer takes the first name in the place of a default.
            flags = [str(flag) for mark in marks for flag in (mark.default, *(mark.param_decls or ()))]
            for number in (int, float):
                if number in kinds:
                    found.append((command.name or "", next(f for f in flags if f.startswith("--")), number))
    return found


OPTIONS = numeric_options()


def test_every_command_with_numbers_is_known() -> None:
    assert len(OPTIONS) > 50 and {command for command, _, _ in OPTIONS} <= NEEDED.keys()
    assert inspect.isfunction(app.registered_commands[0].callback)


@pytest.mark.parametrize(("command", "flag", "kind"), OPTIONS, ids=[f"{c}{f}" for c, f, _ in OPTIONS])
def test_hostile_numbers_are_refused_by_name(
    command: str, flag: str, kind: type, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    hostile = ["nan", "inf", "-inf"] if kind is float else [str(2**70), str(-(2**70))]
    for value in [*hostile, *(["-1"] if flag != "--seed" else [])]:
        base = NEEDED[command]
        if flag in base:
            base = base[: base.index(flag)]
        assert main([command, *base, *NEEDS.get(flag, []), f"{flag}={value}"]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {flag} ") and error.count("\n") == 1, error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 1.0, 1.5])
def test_a_range_takes_only_what_lies_inside(value: float) -> None:
    assert value not in DECAYING


def test_ends_belong_to_a_range_unless_said_otherwise() -> None:
    assert 0.0 in DECAYING and 0 not in POSITIVE and 1 in COUNT and 10**9 in COUNT and 10**9 + 1 not in COUNT
    assert -1e300 in FINITE and -math.inf not in FINITE and 1 in Range(0, 1, above=True)


def test_the_ends_of_seeds_seed_generators() -> None:
    import torch

    for seed in (int(SEED.low), int(SEED.high)):
        torch.Generator().manual_seed(seed + 7919 * 1000)


@pytest.mark.parametrize("settings", [Settings, FitSettings])
def test_every_number_of_the_settings_has_a_range(settings: Any) -> None:
    """A new number without a range would take NaN."""
    hints = get_type_hints(settings)
    for name, each in settings.__dataclass_fields__.items():
        kinds = set(get_args(hints[name])) or {hints[name]}
        if kinds & {int, float}:
            assert option_of(each).range is not None, name


def test_a_field_is_refused_by_its_flag() -> None:
    with pytest.raises(UsageError, match=r"--drift-tol nan: must be above 0"):
        Settings(drift_tolerance=math.nan)
    with pytest.raises(UsageError, match=r"--fit-lr -1: must be above 0"):
        FitSettings(lr=-1.0)
