"""--ema: what is measured and saved is the average of the weights. --accumulate: several batches make one step."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import contents, run
from torch import Tensor

from resode_cli import data
from resode_cli.app import main
from resode_cli.files import model_file
from resode_cli.measuring.evaluate import evaluate
from resode_cli.network.model import OdeResNet
from resode_cli.network.parts import Preprocessing
from resode_cli.training import run_folder
from resode_cli.training.averaging import Average
from resode_cli.training.finetune import finetune
from resode_cli.training.results import Callbacks
from resode_cli.training.settings import Settings
from resode_cli.training.step import Steps

PRE = Preprocessing(size=8, crop_fraction=1.0)
SETTINGS = Settings(adjoint="backprop", batch_size=8, max_steps=4, lr=0.1, bn="batch", schedule="constant", ema=0.5)


def train(model: OdeResNet, out: Path, settings: Settings, **kwargs: Any) -> Any:
    images = data.open_data("digits", PRE, "train", augment=True, images=32, seed=settings.seed)
    test = data.open_data("digits", PRE, "test", images=20)
    return finetune(model, images, test, out=out, settings=settings, **kwargs)


def weights(path: Path) -> dict[str, Tensor]:
    return load_file(path)


@pytest.fixture
def start(pico: OdeResNet, tmp_path: Path) -> Path:
    model_file.save(pico, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def loaded(path: Path) -> OdeResNet:
    return model_file.load(path)


def test_last_is_the_average_of_the_weights_of_all_steps(start: Path, tmp_path: Path) -> None:
    seen: list[dict[str, Tensor]] = []
    model = loaded(start)
    note = Callbacks(on_step=lambda _: seen.append({k: v.clone() for k, v in model.net.named_parameters()}))
    result = train(model, tmp_path / "run", SETTINGS, callbacks=note)
    average = seen[0]
    for step in seen[1:]:
        average = {name: 0.5 * value + 0.5 * step[name] for name, value in average.items()}
    last = loaded(tmp_path / "run" / "last.safetensors")
    for name, value in last.net.named_parameters():
        torch.testing.assert_close(value, average[name], rtol=1e-5, atol=1e-7)
    state = run_folder.load_state(tmp_path / "run")
    for name, value in state.model.net.named_parameters():
        assert torch.equal(value, seen[-1][name]), "the state goes on from the weights themselves"
    test = data.open_data("digits", PRE, "test", images=20)
    assert evaluate(last, data.batches(test, 20)).loss == pytest.approx(result.after.loss, rel=1e-6)


@pytest.mark.parametrize("warmup", [False, True])
def test_an_average_resumes_to_the_bit(warmup: bool, start: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, ema=0.9, ema_warmup=warmup, eval_every=2)
    train(loaded(start), tmp_path / "whole", settings)
    seen: list[Any] = []
    stop = Callbacks(on_step=seen.append, should_stop=lambda: len(seen) >= 3)
    assert train(loaded(start), tmp_path / "parts", settings, callbacks=stop).interrupted
    state = run_folder.load_state(tmp_path / "parts")
    train(state.model, tmp_path / "parts", settings, resume=state)
    for name in ("last", "state", "best"):
        one, other = (weights(tmp_path / run_ / f"{name}.safetensors") for run_ in ("whole", "parts"))
        assert one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())
    plain = tmp_path / "plain"
    train(loaded(start), plain, replace(settings, ema=None, ema_warmup=False))
    raw, held = (weights(folder / "state.safetensors") for folder in (plain, tmp_path / "whole"))
    assert all(torch.equal(value, held[key]) for key, value in raw.items() if key.startswith("model/"))


def test_an_exchange_that_is_cut_short_is_put_back(pico: OdeResNet) -> None:
    from contextlib import nullcontext

    average = Average(pico, SETTINGS)
    average.update(1)
    own = {name: value.clone() for name, value in pico.net.state_dict().items()}
    with torch.no_grad():
        next(pico.parameters()).add_(1.0)
    changed = next(pico.parameters()).clone()
    with pytest.raises(KeyboardInterrupt), average.in_place(nullcontext):
        assert all(torch.equal(value, own[name]) for name, value in pico.net.state_dict().items())
        raise KeyboardInterrupt
    assert torch.equal(next(pico.parameters()), changed)


def test_a_tied_block_is_averaged_once(here: Path) -> None:
    assert main(["deepen", "m.safetensors", "--blocks", "3", "-o", "deep.safetensors"]) == 0
    assert main(run("--ema", "0.5", "--lr", "0.1", "-o", "tied", model="deep.safetensors", steps=2)) == 0
    assert main(run("--lr", "0.1", "-o", "plain", model="deep.safetensors", steps=2)) == 0
    one, other = (contents(Path(name)) for name in ("tied", "plain"))
    assert one["last.safetensors"] != other["last.safetensors"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--ema-warmup"], "--ema-warmup is of --ema DECAY"),
        (["--ema", "1"], "--ema 1: must be"),
        (["--accumulate", "2", "--teacher", "other.safetensors", "--teacher-states", "1"], "--accumulate splits"),
        (["--accumulate", "0"], "--accumulate 0: must be"),
    ],
)
def test_contradictions_are_refused(more: list[str], message: str, here: Path, capsys: Any) -> None:
    assert main(run("-o", "new", *more)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("more", [["--ema", "0.9"], ["--accumulate", "2"]])
def test_a_resumed_run_keeps_both(more: list[str], here: Path, capsys: Any) -> None:
    assert main(run("-o", "run", "--resume", *more, steps=4)) == 2
    assert f"{more[0]} {more[1]}: the run has" in capsys.readouterr().err


@pytest.mark.parametrize("micro", [1, 2])
def test_accumulated_batches_are_one_large_one(micro: int, start: Path, tmp_path: Path) -> None:
    """In float64, where no image sees another: the same steps to its last digits."""
    settings = replace(SETTINGS, ema=None, bn="frozen", mixup=0.5, max_steps=3, log_every=1, lr=1e-3)
    large, parts = loaded(start).double(), loaded(start).double()
    train(large, tmp_path / "large", replace(settings, batch_size=16))
    train(parts, tmp_path / "parts", replace(settings, batch_size=4, accumulate=4, micro_batches=micro))
    for one, other in zip(large.parameters(), parts.parameters(), strict=True):
        assert one.dtype == torch.float64
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    logs = []
    for name in ("large", "parts"):
        with (tmp_path / name / "log.csv").open(newline="") as file:
            logs.append([(row["step"], row["epoch"], row["top1"], row["lr"]) for row in csv.DictReader(file)])
    assert logs[0] == logs[1]


def test_few_images_are_accumulated_in_batches_of_the_size_that_was_asked_for(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    part = Steps._part
    monkeypatch.setattr(Steps, "_part", lambda self, x, y, share: seen.append(len(x)) or part(self, x, y, share))
    train(loaded(start), tmp_path / "run", replace(SETTINGS, batch_size=8, accumulate=100, ema=None, max_steps=1))
    assert seen == [8, 8, 8, 8]


def test_accumulation_resumes_to_the_bit(start: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, batch_size=8, accumulate=2, ema=None)
    train(loaded(start), tmp_path / "whole", settings)
    seen: list[Any] = []
    stop = Callbacks(on_step=seen.append, should_stop=lambda: len(seen) >= 3)
    train(loaded(start), tmp_path / "parts", settings, callbacks=stop)
    state = run_folder.load_state(tmp_path / "parts")
    train(state.model, tmp_path / "parts", settings, resume=state)
    one, other = (weights(tmp_path / name / "last.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_a_dry_run_counts_the_average_and_the_gradients_of_other_batches(here: Path, capsys: Any) -> None:
    def peak(*more: str) -> dict[str, Any]:
        assert main(run("-o", "dry", "--dry-run", "--json", "--batch-size", "4", *more, steps=1)) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    plain, average, twice = peak(), peak("--ema", "0.9"), peak("--accumulate", "3")
    trained = 4 * plain["trained"]
    assert plain["beside"] == 0 and average["beside"] >= trained
    assert average["predicted_bytes"] - plain["predicted_bytes"] >= trained
    waiting = 2 * 4 * 3 * 8 * 8 * 4
    assert twice["predicted_bytes"] - plain["predicted_bytes"] >= waiting
    assert (twice["batch_size"], twice["accumulate"]) == (4, 3)
