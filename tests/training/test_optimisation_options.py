"""The optimizer's own settings, layer decay, clipping and schedules: each changes what it should, or is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import run

from resode_cli.app import main
from resode_cli.errors import UsageError
from resode_cli.network.model import OdeResNet
from resode_cli.training.loop import Loop
from resode_cli.training.optimization import create_optimizer, create_scheduler
from resode_cli.training.results import Progress
from resode_cli.training.settings import Settings

CHANGES = {
    "clip-value": ["--clip-grad", "0.001", "--clip-mode", "value"],
    "clip-agc": ["--clip-grad", "0.01", "--clip-mode", "agc"],
    "layer-decay": ["--layer-decay", "0.5"],
    "betas": ["--optimizer", "adamw", "--opt-betas", "0.5,0.6"],
    "eps": ["--optimizer", "adamw", "--opt-eps", "0.1"],
    "linear": ["--schedule", "linear"],
    "poly": ["--schedule", "poly", "--min-lr", "0.001"],
    "tanh": ["--schedule", "tanh", "--warmup", "1"],
}


@pytest.mark.parametrize("kind", CHANGES)
def test_each_changes_what_is_learned_and_resumes_to_the_bit(kind: str, here: Path) -> None:
    scheduled = "--schedule" in CHANGES[kind]
    alike = ["--lr", "0.05", *(["--optimizer", "adamw"] if "adamw" in CHANGES[kind] else [])]
    alike += [] if scheduled else ["--schedule", "constant"]
    more = [*alike, *CHANGES[kind]]
    assert main(run("-o", "plain", *alike, steps=3)) == 0
    assert main(run("-o", "whole", *more, steps=3)) == 0
    whole, plain = (load_file(f"{name}/last.safetensors") for name in ("whole", "plain"))
    assert not all(torch.equal(whole[key], value) for key, value in plain.items())
    if scheduled:  # a run of another length has other rates from its first step
        return
    assert main(run("-o", "parts", *more, steps=1)) == 0
    assert main(run("-o", "parts", "--resume", steps=3)) == 0
    one, other = (load_file(f"{name}/state.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def rates(settings: Settings, total: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=settings.lr)
    scheduler = create_scheduler(optimizer, settings, total)
    found = []
    for step in range(total + 1):
        scheduler.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize("schedule", ["cosine", "linear", "poly", "tanh"])
def test_schedules_fall_from_one_rate_to_the_other(schedule: str) -> None:
    found = rates(Settings(schedule=schedule, lr=1.0, min_lr=0.2), 100)
    assert found[0] == pytest.approx(1, abs=1e-4) and found[-1] == pytest.approx(0.2, abs=1e-2)
    assert all(a >= b for a, b in zip(found, found[1:], strict=False))
    middle = {
        "cosine": 0.6,
        "linear": 0.6,
        "poly": 0.4,
        "tanh": 0.2 + 0.4 * (1 - math.tanh(-7 * 0.5 + 3 * 0.5)),
    }
    assert found[50] == pytest.approx(middle[schedule], abs=1e-6)


def test_layer_decay_goes_by_stage(pico: OdeResNet) -> None:
    optimizer = create_optimizer(pico, Settings(layer_decay=0.5))
    names = {id(p): name for name, p in pico.net.named_parameters()}
    scales: dict[str, set[float]] = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            scales.setdefault(names[id(p)].split(".")[0], set()).add(group["lr_scale"])
            assert group["weight_decay"] == (0 if p.ndim < 2 else 5e-4)
    assert scales["conv1"] == {0.0625} and scales["layer1"] == {0.125} and scales["layer3"] == {0.5}
    assert {1.0} in scales.values()


def test_adaptive_clipping_leaves_the_head_as_it_is(pico: OdeResNet) -> None:
    from contextlib import nullcontext

    settings = Settings(clip_grad=1e-6, clip_mode="agc", lr=1.0, momentum=0.0, weight_decay=0.0, schedule="constant")
    loop = Loop(
        pico,
        settings,
        torch.device("cpu"),
        Progress(),
        total=1,
        should_stop=lambda: False,
        deferred=nullcontext,
    )
    for p in pico.parameters():
        p.grad = torch.ones_like(p)
    loop.update()
    sizes = {name: float(p.grad.abs().max()) for name, p in pico.net.named_parameters() if p.grad is not None}
    clipped = {name for name, value in sizes.items() if value < 1e-3}
    head = {name for name in sizes if name.startswith(("linear.", "fc."))}
    assert head and clipped == set(sizes) - head


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"opt_betas": "0.9"}, "--opt-betas 0.9: write two or more numbers"),
        ({"opt_betas": "0.9,1"}, "--opt-betas 0.9,1: write two or more numbers"),
        ({"min_lr": 1e-4, "schedule": "constant"}, "--min-lr is where a schedule ends"),
        ({"min_lr": 1.0}, "--min-lr 1 is above --lr 0.001"),
        ({"clip_mode": "agc"}, "--clip-mode agc needs its bound"),
        ({"layer_decay": 0.5, "linear_probe": True}, "--layer-decay is of several layers"),
        ({"clip_mode": "agc", "clip_grad": 1.0, "linear_probe": True}, "--clip-mode agc leaves the head's gradient"),
        ({"layer_decay": 1.5}, "--layer-decay 1.5: must be"),
        ({"schedule": "plateaux"}, "unknown schedule 'plateaux'"),
    ],
)
def test_contradictions_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        Settings(**settings)
    assert message in str(error.value)


@pytest.mark.parametrize(("warmup", "told"), [(3, True), (2, False)])
@pytest.mark.parametrize("look", [[], ["--dry-run"]])
def test_a_warmup_as_long_as_the_run_is_told_of(
    warmup: int, told: bool, look: list[str], here: Path, capsys: Any
) -> None:
    assert main(run("-o", "new", "--warmup", str(warmup), *look)) == 0
    said = f"--warmup {warmup} lasts to the end of the run, at step 3: the learning rate never reaches --lr 0.001"
    assert (said in capsys.readouterr().err) is told


@pytest.mark.parametrize("more", [["--opt-betas", "0.9,0.99"], ["--opt-eps", "1e-6"]])
def test_an_optimizer_without_the_setting_is_named(more: list[str], here: Path, capsys: Any) -> None:
    assert main(run("-o", "new", *more)) == 2
    assert f"{more[0]}: the optimizer momentum has no" in capsys.readouterr().err


def test_momentum_is_refused_where_an_optimizer_has_none(here: Path, capsys: Any) -> None:
    assert main(run("-o", "new", "--optimizer", "adamw", "--momentum", "0.5")) == 2
    assert "--momentum: the optimizer adamw has none to set" in capsys.readouterr().err
    assert main(run("-o", "new", "--optimizer", "sgd", "--momentum", "0.5", steps=1)) == 0
