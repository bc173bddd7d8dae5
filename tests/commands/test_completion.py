"""What a shell is offered for a value that is being typed, how fast, and that it never hears of an error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer.main
from timm.optim import list_optimizers

from resode_cli.app import app, main
from resode_cli.commands import completion
from resode_cli.commands.working_folder import NAME
from resode_cli.data import NAMES
from resode_cli.files import model_file
from resode_cli.gradients.adjoint_choice import NAMES as ADJOINTS
from resode_cli.network.model import OdeResNet
from resode_cli.sources.cifar import DEPTHS

Offer = Callable[..., list[str]]


@pytest.fixture
def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Offer:
    """What bash puts in place of the last word of a line, in an empty folder. cut: as bash cuts words at : and =."""
    monkeypatch.chdir(tmp_path)

    def ask(*words: str, cut: bool = False) -> list[str]:
        parts = [part for word in words for part in (_cut(word) if cut else [word])]
        monkeypatch.setenv("_RESODE_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", "\n".join(["resode", *parts]))
        monkeypatch.setenv("COMP_CWORD", str(len(parts)))
        capsys.readouterr()
        main([])
        out, said = capsys.readouterr()
        assert not said
        return out.splitlines()

    return ask


def _cut(word: str) -> list[str]:
    spaced = word.replace(":", "\n:\n").replace("=", "\n=\n")
    return [part for part in spaced.split("\n") if part] or [""]


def test_networks_are_offered_by_library_name_and_tag(offer: Offer):
    libraries = offer("convert", "")
    assert {"timm:", "torchvision:", "cifar:", "hf-hub:"} <= set(libraries) and len(libraries) < 20
    for cut in (False, True):  # the library stands there already, and bash puts the rest behind it
        names = offer("convert", "timm:resnet5", cut=cut)
        assert "resnet50" in names and all(name.startswith("resnet5") for name in names)
        assert "resnet50.a1_in1k" in offer("convert", "timm:resnet50.", cut=cut)
        assert "resnet18" in offer("convert", "torchvision:", cut=cut)
        assert offer("convert", "cifar:resnet5", cut=cut) == ["resnet56"]
    assert "resnet50" in offer("convert", "resnet5")
    assert "resnet18" in offer("finetune", "timm:resn", cut=True)


def test_files_and_folders_are_offered_where_they_suit(offer: Offer, tmp_path: Path):
    for name in ("m.safetensors", "mine.py", "more.csv", "my.toml", "ma.tar"):
        (tmp_path / name).touch()
    (tmp_path / "many").mkdir()
    assert offer("finetune", "m")[:3] == ["m.safetensors", "many/", "mine.py"]
    assert offer("eval", "m") == ["m.safetensors", "many/"]
    assert offer("eval", "m.safetensors", "--data", "m") == ["mnist", "ma.tar", "many/", "more.csv"]
    assert offer("finetune", "--recipe", "m") == ["many/", "my.toml"]
    assert offer("eval", "m.safetensors", "--data", "wds:m", cut=True) == ["ma.tar", "many/"]


@pytest.mark.parametrize(
    "words, expected",
    [
        (["finetune", "--schedule", "co"], ["cosine", "constant"]),
        (["finetune", "--aug", "tri"], ["trivialaugment"]),
        (["finetune", "--optimizer", "momen"], ["momentum"]),
        (["finetune", "--track", "wandb,ml"], ["wandb,mlflow"]),
        (["eval", "--split", ""], ["test", "val", "train", "all"]),
        (["eval", "--device", "c"], ["cpu", "cuda"]),
        (["check-grad", "--adjoint", "pc,heun"], ["pc,heun", "pc,heunnet"]),
        (["finetune", "--recipe", "digits-p"], ["digits-pretrain"]),
        (["finetune", "--sched"], ["--schedule"]),
        (["eval", "--data", "cifar"], ["cifar10", "cifar100"]),
    ],
    ids=lambda value: value[1] if len(value) > 1 else "",
)
def test_words_of_options_are_offered(words: list[str], expected: list[str], offer: Offer):
    assert offer(*words) == expected


def test_bash_cuts_words_at_equals_signs_and_colons(offer: Offer):
    assert offer("finetune", "--schedule=co", cut=True) == ["cosine", "constant"]
    assert offer("finetune", "--adjoint", "pc:an", cut=True) == ["anchors="]
    assert offer("finetune", "--adjoint=pc:an", cut=True) == ["anchors="]
    assert offer("finetune", "--adjoint", "layer1=mult", cut=True) == ["multistep"]
    assert offer("finetune", "--adjoint", "layer1=mult") == ["multistep"]


def test_stages_are_those_of_the_model_on_the_line_or_of_the_folder(pico: OdeResNet, offer: Offer):
    model_file.save(pico, "m.safetensors")
    assert offer("finetune", "m.safetensors", "--stage", "") == ["layer1", "layer2", "layer3"]
    assert offer("finetune", "m.safetensors", "--stage", "layer1,") == ["layer1,layer2", "layer1,layer3"]
    assert offer("finetune", "m.safetensors", "--adjoint", "lay") == ["layer1=", "layer2=", "layer3="]
    assert offer("finetune", "--stage", "") == []
    Path("resode.toml").write_text('model = "m.safetensors"\n')
    assert offer("finetune", "--stage", "layer3") == ["layer3"]


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 64, (16).to_bytes(8, "little") + b'{"__metadata__":'])
def test_a_damaged_model_or_memory_offers_nothing_and_says_nothing(content: bytes, offer: Offer):
    Path("m.safetensors").write_bytes(content)
    assert offer("finetune", "m.safetensors", "--stage", "") == []
    Path("resode.toml").write_text("this is = no [ TOML")
    assert offer("finetune", "--stage", "") == []
    assert offer("finetune", "--resume", "no/such/folder/") == []
    assert offer("nonsense", "x") == []


def test_what_is_offered_is_what_there_is():
    assert ADJOINTS == completion.ADJOINTS and NAMES == completion.DATA_SETS and NAME == completion.MEMORY
    assert tuple(f"cifar:{name}" for name in DEPTHS) == completion.CIFAR
    assert set(list_optimizers()) <= set(completion.optimizers(None, ""))  # type: ignore[arg-type]


def test_a_shell_is_answered_without_torch(tmp_path: Path):
    """In a process of its own, which counts the seconds that it computes: others may share the cores."""
    code = (
        "import json, resource, sys, resode_cli.app as app; code = app.main([]);"
        "used = resource.getrusage(resource.RUSAGE_SELF);"
        "heavy = [name for name in ('torch', 'timm', 'torchvision', 'numpy') if name in sys.modules];"
        "print(json.dumps([code, heavy, used.ru_utime + used.ru_stime]), file=sys.stderr)"
    )
    asked = {"_RESODE_COMPLETE": "complete_bash", "COMP_WORDS": "resode convert timm:resnet50", "COMP_CWORD": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, **asked}, capture_output=True, text=True
    )
    found, heavy, seconds = json.loads(done.stderr)
    assert "resnet50\n" in done.stdout and (found, heavy) == (0, []) and seconds < 2


def test_every_setting_of_a_run_stands_in_a_group_of_the_help():
    command = typer.main.get_command(app).commands["finetune"]  # type: ignore[attr-defined]
    without = {p.name for p in command.params if getattr(p, "rich_help_panel", None) is None} - {"help"}
    # The model, what goes with it, and what is of the command rather than of the run.
    own = {
        "model",
        "out",
        "pretrained",
        "weights",
        "new_head",
        "dry_run",
        "find_lr",
        "resume",
        "recipe",
        "force",
        "json",
    }
    assert without <= own
