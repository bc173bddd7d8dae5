"""--unfreeze-every: what is trained when, what that costs, that it resumes, and what it does not go with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import run
from torch import Tensor

from resode_cli.app import main
from resode_cli.errors import UsageError
from resode_cli.files import model_file
from resode_cli.gradients.choose import choose_adjoints
from resode_cli.network.model import OdeResNet
from resode_cli.ode import Adjoint
from resode_cli.training import guard
from resode_cli.training.settings import Settings
from resode_cli.training.trained import train_only
from resode_cli.training.unfreezing import Unfreezing, parts_from_the_head

PARTS = ["head", "layer3", "layer2", "layer1", "stem"]
EVERYTHING = (
    "--unfreeze-every 2 --ema 0.8 --layer-decay 0.7 --bn batch --optimizer adamw --freeze layer2.*.bn1.*,conv1"
    " --clip-grad 1 --schedule constant --lr 0.02 --epochs 8"
).split()


def load() -> OdeResNet:
    return model_file.load("m.safetensors", trust_source=True)


def changed(after: str) -> set[str]:
    """The parts of m.safetensors that training has changed."""
    old, new, groups = load(), model_file.load(after, trust_source=True), load().parameter_groups()
    values = dict(new.net.named_parameters())
    odd = (name for name, p in old.net.named_parameters() if not torch.equal(p, values[name]))
    return {groups[name].removesuffix(" transition") for name in odd}


def unfreezing(model: OdeResNet, every: int = 10, total: int = 60, **more: Any) -> Unfreezing:
    settings = Settings(unfreeze_every=every, **more)
    train_only(model, settings, lambda said: None)
    return Unfreezing(model, settings, total)


def trained(model: OdeResNet) -> set[str]:
    groups = model.parameter_groups()
    return {groups[n].removesuffix(" transition") for n, p in model.net.named_parameters() if p.requires_grad}


def test_one_part_more_is_trained_every_so_many_steps_and_it_is_said(here: Path, capsys: Any) -> None:
    for steps in (2, 4, 6):
        assert main(run("-o", f"{steps}", "--unfreeze-every", "1", "--lr", "0.1", "--epochs", "9", steps=steps)) == 0
        assert changed(f"{steps}/last.safetensors") == set(PARTS[:steps])
    said = capsys.readouterr().err
    assert "head is trained alone at first, then one more every 1 step: layer3, layer2, layer1, stem" in said
    assert all(f"step {n}: {part} is trained from here on" in said for n, part in enumerate(PARTS) if n)
    assert "the run ends at step 4, before stem is trained" in said


def test_every_parameter_has_its_part(pico: OdeResNet) -> None:
    found = parts_from_the_head(pico)
    names = [name for own in found.values() for name in own]
    assert sorted(names) == sorted(name for name, _ in pico.net.named_parameters())
    assert list(found) == ["head", *reversed(pico.stages), "stem"]


def test_what_stands_between_two_stages_goes_with_the_later_one(here: Path) -> None:
    model = load()
    model.net.register_module("behind", torch.nn.Linear(2, 2))
    modules = model.net._modules
    names = list(modules)
    between = dict(modules)
    modules.clear()
    order = [*names[: names.index("layer2")], "behind", *names[names.index("layer2") : -1]]
    modules.update({name: between[name] for name in order})
    found = parts_from_the_head(model)
    assert "behind.weight" in found["layer2"] and set(found["head"]) == {"linear.weight", "linear.bias"}


@pytest.mark.parametrize("adjoint", ["backprop", "checkpoint", "pc", "euler", "multistep"])
def test_the_backward_pass_ends_where_training_begins(adjoint: str, here: Path) -> None:
    """A block of a stage that is not trained yet runs once, and its result needs no gradient."""
    model = load()
    model.use_adjoint(Adjoint(adjoint))
    turns = unfreezing(model)
    calls: dict[str, list[bool]] = {}
    for name, module in model.net.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda _, inputs, out, of=name: calls[of].append(out.requires_grad))
    parts = {name.removesuffix(".weight"): part for name, part in model.parameter_groups().items()}
    model.eval()
    for step, count in ((0, 1), (10, 2), (20, 3), (30, 4), (45, 5)):
        turns.at(step)
        assert trained(model) == set(PARTS[:count])
        calls |= {name: [] for name, module in model.net.named_modules() if isinstance(module, torch.nn.Conv2d)}
        model.zero_grad(set_to_none=True)
        model(torch.rand(2, 3, 8, 8)).square().sum().backward()
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
        for name, seen in calls.items():
            if parts[name].removesuffix(" transition") in PARTS[:count]:
                assert any(seen) and (adjoint == "backprop" or len(seen) > 1)
            else:
                assert seen == [False]


def test_with_everything_it_resumes_to_the_bit_from_any_phase(here: Path) -> None:
    more = [*EVERYTHING, "--adjoint", "checkpoint"]
    assert main(run("-o", "whole", *more, steps=11)) == 0
    for stops in ((3, 6), (4, 8, 9)):  # within a phase, and where one begins
        name = "-".join(map(str, stops))
        assert main(run("-o", name, *more, steps=stops[0])) == 0
        for steps in (*stops[1:], 11):
            assert main(run("-o", name, "--resume", "--adjoint", "checkpoint", steps=steps)) == 0
        for file in ("state", "last"):
            a, b = (load_file(f"{folder}/{file}.safetensors") for folder in ("whole", name))
            assert a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())
    frozen, before = load_file("whole/last.safetensors"), load_file("m.safetensors")
    assert torch.equal(frozen["conv1.weight"], before["conv1.weight"]), "what is frozen stays so"
    assert not torch.equal(frozen["bn1.weight"], before["bn1.weight"])


def test_statistics_move_where_a_part_is_trained(here: Path) -> None:
    """With --bn batch; those of a part that waits for its turn rest."""
    for steps, moved in ((2, False), (6, True)):
        more = ["--bn", "batch", "--unfreeze-every", "1", "--epochs", "9"]
        assert main(run("-o", f"{steps}", *more, steps=steps)) == 0
        before, after = load_file("m.safetensors"), load_file(f"{steps}/last.safetensors")
        assert torch.equal(before["bn1.running_mean"], after["bn1.running_mean"]) is not moved


def test_a_plan_is_made_for_all_that_will_be_trained(here: Path, monkeypatch: Any) -> None:
    seen = []
    choose = choose_adjoints

    def watched(model: OdeResNet, *args: Any, **more: Any) -> Any:
        seen.append(trained(model))
        return choose(model, *args, **more)

    monkeypatch.setattr(guard, "choose_adjoints", watched)
    assert main([*run("-o", "new", "--unfreeze-every", "1", "--epochs", "9", steps=3), "--adjoint", "auto"]) == 0
    assert seen == [set(PARTS)] and changed("new/last.safetensors") == set(PARTS[:3])


def test_inside_a_block_all_parts_are_trained_and_what_was_seen_is_forgotten(here: Path) -> None:
    model = load()
    turns = unfreezing(model)
    turns.at(10)
    model.stem.kept[(True,)] = "seen"
    with turns.all_trained():
        assert trained(model) == set(PARTS) and not model.stem.kept
    assert trained(model) == {"head", "layer3"}
    turns.at(10)
    assert turns.at(20) == ["layer2"] and turns.at(21) == [] and turns.at(1000) == ["layer1", "stem"]


def test_frozen_parts_take_no_turn(here: Path) -> None:
    model = load()
    turns = unfreezing(model, freeze=("layer3", "linear"))
    assert list(turns.parts) == ["layer2", "layer1", "stem"]
    with pytest.raises(UsageError, match="nothing to unfreeze: head is all that is trained"):
        unfreezing(load(), freeze=("layer*", "stem"))


def test_a_compiled_stage_is_trained_when_its_turn_comes(here: Path, monkeypatch: Any) -> None:
    """torch.compile's `eager` stands for it: dynamo looks at what needs a gradient whatever compiles the graph."""
    model = load()
    model.use_adjoint(Adjoint("checkpoint"))
    turns = unfreezing(model)
    model.compile_branches(backend="eager")
    model.eval()
    images = torch.rand(2, 3, 8, 8)
    gradients: list[dict[str, Tensor]] = []
    for step in (0, 30):
        turns.at(step)
        model.zero_grad(set_to_none=True)
        model(images).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.net.named_parameters() if p.grad is not None})
    assert "layer1.0.conv1.weight" not in gradients[0] and gradients[1]["layer1.0.conv1.weight"].abs().max() > 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--linear-probe"], "--unfreeze-every trains all parts in turn, --linear-probe one"),
        (["--stage", "layer3"], "--unfreeze-every trains all parts in turn, --stage some"),
        (["--max-steps", "2"], "--unfreeze-every 2: the run ends at step 2, before anything but head is trained"),
    ],
)
def test_what_it_does_not_go_with(more: list[str], message: str, here: Path, capsys: Any) -> None:
    assert main(run("-o", "new", "--unfreeze-every", "2", *more)) == 2
    assert message in capsys.readouterr().err
    assert main(run("-o", "run", "--resume", "--unfreeze-every", "1", steps=5)) == 2
    assert "--unfreeze-every 1: the run has unset, and keeps it" in capsys.readouterr().err


def test_a_dry_run_says_it_too(here: Path, capsys: Any) -> None:
    assert main(run("-o", "new", "--unfreeze-every", "2", "--dry-run", steps=9)) == 0
    found = capsys.readouterr()
    assert "head is trained alone at first" in found.err and "activations" in found.out
