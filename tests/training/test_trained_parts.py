"""Which parameters a run trains: --stage with a fresh head, --freeze, --linear-probe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import SMALL, run
from torch import Tensor

from resode_cli.app import main
from resode_cli.files import model_file
from resode_cli.network.model import OdeResNet
from resode_cli.training.settings import Settings
from resode_cli.training.starting import prepare_to_train
from resode_cli.training.trained import fresh_head, train_only


def state(path: str) -> dict[str, Tensor]:
    return model_file.load(path, trust_source=True).net.state_dict()


def changed(before: str, after: str) -> set[str]:
    """Names of the tensors that differ."""
    old, new = state(before), state(after)
    return {name for name in old if not torch.equal(old[name], new[name])}


@pytest.fixture
def fresh(here: Path) -> Path:
    """The weights of m.safetensors in a network with a head for eight classes in place of ten."""
    made = model_file.load("m.safetensors", trust_source=True)
    torch.save(made.net.state_dict(), "m.pth")
    small = [flag if flag != "10" else "8" for flag in SMALL if flag != "--no-pretrained"]
    Path("eight.py").write_text(Path("net.py").read_text())
    assert main(["convert", "eight.py:small", *small, "--weights", "m.pth", "-o", "fresh.safetensors"]) == 0
    return here


def eight(make_folder: Any) -> list[str]:
    return ["--data", str(make_folder(classes=[f"c{i}" for i in range(8)], each=3, size=8))]


def test_a_fresh_head_is_trained_with_a_stage_until_it_has_been(fresh: Path, make_folder: Any, capsys: Any) -> None:
    data = eight(make_folder)
    stage = ["--stage", "layer3", "--lr", "0.1"]
    assert main(run(*data, *stage, "-o", "first", model="fresh.safetensors", steps=1)) == 0
    assert "the head started at random, so it is trained beside --stage" in capsys.readouterr().err
    both = changed("fresh.safetensors", "first/last.safetensors")
    assert {name.partition(".")[0] for name in both} == {"layer3", "linear"}
    assert main(run(*data, *stage, "-o", "second", model="first/last.safetensors", steps=1)) == 0
    assert "started at random" not in capsys.readouterr().err
    assert {n.partition(".")[0] for n in changed("first/last.safetensors", "second/last.safetensors")} == {"layer3"}


def test_a_stage_alone_leaves_the_head_fresh_and_may(fresh: Path, make_folder: Any, capsys: Any) -> None:
    alone = ["--stage", "layer3", "--freeze", "linear", "--lr", "0.1"]
    assert main(run(*eight(make_folder), *alone, "-o", "own", model="fresh.safetensors", steps=1)) == 0
    assert "started at random" not in capsys.readouterr().err
    assert {n.partition(".")[0] for n in changed("fresh.safetensors", "own/last.safetensors")} == {"layer3"}
    assert fresh_head(model_file.load("own/last.safetensors", trust_source=True)) == ("linear.weight", "linear.bias")


def test_a_fresh_head_that_is_frozen_is_told_of(fresh: Path, make_folder: Any, capsys: Any) -> None:
    data = eight(make_folder)
    for pattern in ("head", "linear.weight"):
        assert main(run(*data, "--freeze", pattern, "-o", pattern, model="fresh.safetensors", steps=1)) == 0
        assert f"the head started at random, and --freeze {pattern} leaves it so" in capsys.readouterr().err
    for model, pattern in (("fresh", "linear.bias"), ("m", "head")):
        more = data if model == "fresh" else []
        assert main(run(*more, "--freeze", pattern, "-o", model, model=f"{model}.safetensors", steps=1)) == 0
        assert "started at random" not in capsys.readouterr().err


def test_weights_that_bring_their_head_have_none_that_is_fresh(here: Path) -> None:
    assert fresh_head(model_file.load("m.safetensors", trust_source=True)) == ()


def test_a_linear_probe_resumes_to_the_bit(here: Path) -> None:
    probe = ["--linear-probe", "--lr", "0.1"]
    assert main(run(*probe, "-o", "whole", steps=4)) == 0
    assert changed("m.safetensors", "whole/last.safetensors") == {"linear.weight", "linear.bias"}
    assert main(run(*probe, "--schedule", "constant", "-o", "parts", steps=4)) == 0
    assert main(run(*probe, "--schedule", "constant", "-o", "again", steps=2)) == 0
    assert main(run(*probe, "-o", "again", "--resume", steps=4)) == 0
    assert not changed("parts/last.safetensors", "again/last.safetensors")


def test_auto_has_nothing_to_choose_for_a_linear_probe(here: Path) -> None:
    assert main([*run("--linear-probe", "-o", "auto", steps=1), "--adjoint", "auto"]) == 0
    assert main([*run("--linear-probe", "--dry-run", "-o", "dry", steps=1), "--adjoint", "auto"]) == 0


@pytest.mark.parametrize(
    ("patterns", "trained"),
    [
        (["*.weight"], {"bias"}),
        (["stem,layer*", "head"], set()),
        (["layer1,layer2", "conv1,bn1,linear"], {"layer3"}),
        (["linear.bias"], None),
    ],
)
def test_patterns_name_parts_modules_and_parameters(patterns, trained, here: Path, capsys: Any) -> None:
    more = [part for pattern in patterns for part in ("--freeze", pattern)]
    code = main(run(*more, "-o", "frozen", "--lr", "0.1", steps=1))
    if trained == set():
        assert code == 2 and "leaves nothing to train" in capsys.readouterr().err
        return
    assert code == 0
    found = changed("m.safetensors", "frozen/last.safetensors")
    if trained is None:
        assert "linear.bias" not in found and "linear.weight" in found
    else:
        assert found and all(trained & set(name.split(".")) for name in found)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--freeze", "layer9"], "unknown pattern of --freeze 'layer9'; did you mean layer"),
        (["--linear-probe", "--stage", "layer1"], "leave out one"),
        (["--linear-probe", "--bn", "batch"], "leave out --bn batch"),
        (["--linear-probe", "--freeze", "linear"], "leaves nothing to train"),
    ],
)
def test_contradictions_are_refused(more: list[str], message: str, here: Path, capsys: Any) -> None:
    assert main(run(*more, "-o", "new")) == 2
    assert message in capsys.readouterr().err and not Path("new/state.safetensors").exists()


def test_a_resumed_run_keeps_what_is_frozen(here: Path, capsys: Any) -> None:
    assert main(run("--freeze", "conv1,linear", "-o", "kept", steps=1)) == 0
    assert main(run("--freeze", "linear", "-o", "kept", "--resume", steps=2)) == 2
    assert "--freeze linear: the run has conv1,linear, and keeps it" in capsys.readouterr().err
    assert main(run("--freeze", "conv1", "--freeze", "linear", "-o", "kept", "--resume", steps=2)) == 0


def test_norms_of_frozen_parts_keep_their_statistics(pico: OdeResNet) -> None:
    settings = Settings(bn="batch", freeze=("layer1", "bn1"))
    train_only(pico, settings, lambda _: None)
    prepare_to_train(pico, settings)
    modes = {name: m.training for name, m in pico.net.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
    assert {name.partition(".")[0] for name, training in modes.items() if not training} == {"bn1", "layer1"}
    assert any(modes.values())


@pytest.mark.parametrize("adjoint", ["pc", "checkpoint"])
def test_stages_below_the_first_that_is_trained_are_not_run_again(adjoint: str, pico: OdeResNet) -> None:
    from resode_cli import Adjoint

    train_only(pico, Settings(stages=("layer3",)), lambda _: None)
    pico.use_adjoint(Adjoint(adjoint))
    pico.train()
    pico(torch.randn(2, *pico.info.preprocessing.shape)).sum().backward()
    evaluations = {name: stage.monitor.evaluations for name, stage in pico.stages.items()}
    assert not evaluations["layer1"] and not evaluations["layer2"] and evaluations["layer3"]
