"""--batch-size auto, --accumulate auto: batches that fit into memory, found once, and then the run's own."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import run

from resode_cli import data
from resode_cli.app import main
from resode_cli.errors import ResodeError, UsageError
from resode_cli.gradients.results import OverBudgetError
from resode_cli.network.model import OdeResNet
from resode_cli.network.parts import Preprocessing
from resode_cli.quantities import size
from resode_cli.training import batching
from resode_cli.training.batching import Search, sizes_up_to
from resode_cli.training.dry_run import dry_run
from resode_cli.training.finetune import finetune
from resode_cli.training.run_folder import load_state
from resode_cli.training.settings import Settings
from resode_cli.training.step import Steps

PRE = Preprocessing(size=8, crop_fraction=1.0)
CPU = torch.device("cpu")


def images(count: int = 300) -> data.ImageData:
    return data.open_data("digits", PRE, "train", augment=False, images=count)


def predicted(model: OdeResNet, settings: Settings) -> int:
    silent: Any = {"on_message": lambda text: None, "on_choice": lambda chosen: None}
    return dry_run(model, images(), settings, CPU, **silent).predicted_bytes


def search(model: OdeResNet, settings: Settings, count: int = 300) -> Search:
    return Search(model, images(count), settings, CPU)


def test_sizes_are_powers_of_two_and_multiples_of_8() -> None:
    assert list(sizes_up_to(30)) == [1, 2, 4, 8, 16, 24]
    assert list(sizes_up_to(30, least=3)) == [4, 8, 16, 24] and list(sizes_up_to(3, least=3)) == [3]


@pytest.mark.parametrize("more", [{}, {"accumulate": 2}, {"micro_batches": 4}, {"bn": "batch", "ema": 0.9}])
def test_the_largest_batch_fits_and_the_next_size_does_not(more: dict[str, Any], pico: OdeResNet) -> None:
    given = Settings(adjoint="backprop", batch_size="auto", memory_budget="700KiB", **more)
    found = search(pico, given).largest_batch()
    batch = found.settings.images_per_batch
    assert batch % 8 == 0 and found.settings == replace(given, batch_size=batch)
    here, next_one = (predicted(pico, replace(found.settings, batch_size=n)) for n in (batch, batch + 8))
    assert here == found.step.bytes <= 700 * 1024 < next_one
    assert f"{batch} images a step" in found.line and f", predicted peak {size(here)} of 700 KiB" in found.line


def test_a_batch_has_no_more_images_than_there_are_and_no_more_than_256(pico: OdeResNet) -> None:
    given = Settings(adjoint="backprop", batch_size="auto")
    assert search(pico, given).largest_batch().settings.batch_size == 256
    assert search(pico, given, 30).largest_batch().settings.batch_size == 24
    assert search(pico, replace(given, accumulate=2), 30).largest_batch().settings.batch_size == 8


def test_the_planner_is_asked_where_it_chooses(pico: OdeResNet) -> None:
    """Where images mix, it has no micro-batches; a plan that evaluates again fits more images than backprop."""
    given = Settings(batch_size="auto", memory_budget="200KiB", bn="batch")
    planned = search(pico, given, 24).largest_batch()
    held = search(pico, replace(given, adjoint="backprop"), 24).largest_batch()
    assert planned.settings.images_per_batch > held.settings.images_per_batch
    apart = search(pico, replace(given, bn="frozen"), 24).largest_batch()
    assert apart.settings.batch_size == 24 and apart.step.micro_batches > 1
    assert f"24 images a step in {apart.step.micro_batches} micro-batches" in apart.line


@pytest.mark.parametrize("bn", ["batch", "sync"])
def test_statistics_of_a_batch_are_of_two_images_at_least(bn: str, pico: OdeResNet) -> None:
    given = Settings(adjoint="backprop", memory_budget="20KiB", bn=bn, batch_size="auto")
    with pytest.raises(OverBudgetError, match="down to 2 images"):
        search(pico, given).largest_batch()


def test_a_search_leaves_model_and_generators_as_they_are(pico: OdeResNet) -> None:
    before = {name: value.clone() for name, value in pico.state_dict().items()}
    adjoints, modes = pico.adjoints, [module.training for module in pico.modules()]
    random = torch.get_rng_state()
    search(pico, Settings(batch_size="auto", memory_budget="200KiB", stages=("layer3",)), 24).largest_batch()
    assert all(torch.equal(value, before[name]) for name, value in pico.state_dict().items())
    assert (pico.adjoints, [module.training for module in pico.modules()]) == (adjoints, modes)
    assert all(p.requires_grad for p in pico.parameters()) and torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize("adjoint", ["auto", "backprop"])
def test_accumulation_makes_a_batch_fit_that_does_not_in_one_piece(
    adjoint: str, pico: OdeResNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = Settings(adjoint=adjoint, batch_size=48, memory_budget="420KiB", bn="batch", max_steps=1)
    if adjoint == "auto":
        with pytest.raises(OverBudgetError, match="at least .* or split it .--accumulate auto, or --bn frozen"):
            predicted(pico, given)
    else:
        assert predicted(pico, given) > 420 * 1024
    found = search(pico, replace(given, accumulate="auto")).fewest_parts()
    count = found.settings.batches_per_step
    assert count > 1 and found.settings.step_images == 48 and found.step.bytes <= 420 * 1024
    assert f"{count} times {48 // count} images" in found.line
    seen: list[int] = []
    part = Steps._part
    monkeypatch.setattr(Steps, "_part", lambda self, x, y, share: seen.append(len(x)) or part(self, x, y, share))
    finetune(pico, images(), None, out=tmp_path / "run", settings=found.settings, device=CPU)
    assert seen == [48 // count] * count


def test_as_few_parts_as_fit(pico: OdeResNet) -> None:
    given = Settings(adjoint="backprop", batch_size=48, accumulate="auto", bn="batch")
    for count, fewer in ((2, 1), (4, 3)):
        needed = predicted(pico, replace(given, batch_size=48 // count, accumulate=count))
        assert needed < predicted(pico, replace(given, batch_size=48 // fewer, accumulate=fewer))
        tight = replace(given, memory_budget=f"{needed}B")
        assert search(pico, tight).fewest_parts().settings.accumulate == count
    assert search(pico, given).fewest_parts().settings == replace(given, accumulate=1)


def test_micro_batches_of_the_planner_are_the_same_step_in_parts(pico: OdeResNet, tmp_path: Path) -> None:
    """Where no image sees another, 'auto' itself makes a batch possible that is not in one piece."""
    given = Settings(batch_size=48, memory_budget="420KiB", max_steps=1)
    with pytest.raises(OverBudgetError):
        predicted(pico, replace(given, bn="batch"))
    assert search(pico, replace(given, accumulate="auto")).fewest_parts().settings.accumulate == 1
    finetune(pico, images(), None, out=tmp_path / "run", settings=given, device=CPU)
    assert load_state(tmp_path / "run").progress["guard"]["micro_batches"] > 1


def test_where_nothing_fits_what_a_step_takes_is_said(pico: OdeResNet, monkeypatch: Any) -> None:
    given = Settings(adjoint="backprop", memory_budget="20KiB", bn="batch", batch_size="auto")
    with pytest.raises(OverBudgetError, match="of 20 KiB: .* at least .* --batch-size auto finds no batch .* 2 images"):
        search(pico, given).largest_batch()
    hopeless, asked = search(pico, given), []
    plan = hopeless._at
    monkeypatch.setattr(hopeless, "_at", lambda settings: asked.append(settings.batch_size) or plan(settings))
    with pytest.raises(OverBudgetError):
        hopeless.largest_batch()
    assert asked == [256, 2]  # each is a plan, which takes seconds
    with pytest.raises(OverBudgetError, match="--accumulate auto finds no batch that fits, down to 2 images"):
        search(pico, replace(given, adjoint="auto", batch_size=2, accumulate="auto")).fewest_parts()


def test_what_is_found_is_the_runs_own_whatever_is_free_later(here: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(batching, "free_bytes", lambda device: 2**30)
    assert main(run("-o", "new", "--batch-size", "auto", "--accumulate", "2", steps=1)) == 0
    assert "--batch-size auto: 2 times 8 images a step, predicted peak " in capsys.readouterr().err
    assert tomllib.loads(Path("new/config.toml").read_text())["finetune"]["batch-size"] == 8
    state = load_state(here / "new")
    assert (state.settings["batch_size"], state.settings["accumulate"]) == (8, 2)
    monkeypatch.setattr(batching, "free_bytes", lambda device: 1)
    assert main(run("-o", "new", "--resume", "--batch-size", "auto", "--accumulate", "2", steps=2)) == 0
    assert load_state(here / "new").settings["batch_size"] == 8
    assert main(run("-o", "new", "--resume", "--batch-size", "16", steps=3)) == 2
    assert "--batch-size 16: the run has 8, and keeps it" in capsys.readouterr().err


def test_accumulation_that_was_found_resumes_by_the_same_command(here: Path, capsys: Any) -> None:
    command = run(
        "-o", "new", "--batch-size", "16", "--accumulate", "auto", "--memory-budget", "55KiB", "--bn", "batch"
    )
    assert main([*command, "--max-steps", "1"]) == 0
    assert "--accumulate auto: " in capsys.readouterr().err
    settings = load_state(here / "new").settings
    assert settings["accumulate"] > 1 and settings["batch_size"] * settings["accumulate"] == 16
    assert main([*command, "--max-steps", "2", "--resume"]) == 0
    assert load_state(here / "new").settings == {**settings, "max_steps": 2}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--batch-size", "auto", "--accumulate", "auto"], "--batch-size auto looks for the largest batch, and"),
        (["--batch-size", "many"], "--batch-size 'many': write a whole number, or auto"),
        (["--batch-size", "0"], "--batch-size 0: must be 1 or more"),
        (["--accumulate", "auto", "--teacher", "other.safetensors", "--teacher-states", "1"], "--accumulate splits"),
        (["--memory-budget", "1GiB"], "--memory-budget is for methods that are chosen"),
        (["--batch-size", "auto", "--grad-tol", "0.1"], "--grad-tol is for methods that are chosen"),
    ],
)
def test_contradictions_are_refused(more: list[str], message: str, here: Path, capsys: Any) -> None:
    assert main(run("-o", "new", *more)) == 2
    assert message in capsys.readouterr().err


def test_a_network_that_cannot_be_simulated_needs_numbers(pico: OdeResNet) -> None:
    def decides(_: torch.nn.Module, given: tuple[torch.Tensor]) -> torch.Tensor:
        (x,) = given
        return x if float(x.detach().sum()) > 1e9 else x * 1

    pico.net.conv1.register_forward_pre_hook(decides)  # type: ignore[union-attr]
    with pytest.raises(ResodeError, match="give --batch-size and --accumulate as numbers"):
        search(pico, Settings(adjoint="backprop", batch_size="auto")).largest_batch()


def test_settings_that_are_not_decided_train_nothing(pico: OdeResNet, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--batch-size auto is not a number yet"):
        finetune(pico, images(), None, out=tmp_path / "run", settings=Settings(batch_size="auto"), device=CPU)
