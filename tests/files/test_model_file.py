"""The model file: exact round trips, and refusals by name."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from resode_cli.errors import ResodeError, UsageError
from resode_cli.files import model_file
from resode_cli.files.model_file import load, read_metadata, save
from resode_cli.machine.atomic import check_output
from resode_cli.network.model import OdeResNet
from resode_cli.surgery.rewrite import deepen, tie, untie

Change = Callable[[dict[str, Tensor], dict[str, Any]], Any]


def apply(model: OdeResNet, *rewrites) -> OdeResNet:
    for rewrite in rewrites:
        for name, stage in model.stages.items():
            model.replace_stage(name, rewrite(stage))
    return model


VARIANTS = {
    "converted": (),
    "tied": (tie,),
    "replicated": (lambda s: deepen(s, 7),),
    "untied": (lambda s: deepen(s, 7), untie),
    "tied and replicated": (tie, lambda s: deepen(s, 5)),
    "interpolated": (lambda s: deepen(s, 5, mode="interpolate"),),
    "identity": (lambda s: deepen(s, 7, mode="identity"),),
    "replicated, identity": (lambda s: deepen(s, 5), lambda s: deepen(s, 7, mode="identity")),
}


@pytest.fixture
def saved(tiny: OdeResNet, tmp_path: Path) -> Path:
    save(tiny, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def rewrite(path: Path, change: Change) -> None:
    """Write the file again with its tensors and metadata changed in place."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = json.loads(file.metadata()["resode"])
    del metadata["checksum"]
    metadata["format"] = 2  # which had none
    change(tensors, metadata)
    save_file(tensors, path, metadata={"resode": json.dumps(metadata)})


def test_a_file_from_before_format_4_keeps_the_papers_rule(saved: Path):
    """Its 'heun' took the weights of the next step too, as `heunnet` does now."""

    def as_then(tensors: dict, metadata: dict) -> None:
        for stage in metadata["stages"]:
            stage["scheme"] = "heun"

    rewrite(saved, as_then)
    assert {stage.spec.scheme for stage in load(saved).stages.values()} == {"heunnet"}
    save(load(saved), saved)
    assert {stage.spec.scheme for stage in load(saved).stages.values()} == {"heunnet"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip_is_exact(variant: str, tiny: OdeResNet, images, tmp_path):
    model = apply(tiny, *VARIANTS[variant])
    save(model, tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(images), model.eval()(images))
    assert [s.spec for s in loaded.stages.values()] == [s.spec for s in model.stages.values()]
    state = loaded.file_state()
    assert set(state) == set(model.file_state())
    assert all(torch.equal(state[key], value) for key, value in model.file_state().items())
    assert loaded.info == model.info


@pytest.mark.parametrize("form, scheme", [("pre", "euler"), ("exact", "heun"), ("pre", "heun")])
def test_forms_and_forward_rules_survive(form: str, scheme: str, build_tiny, images, tmp_path):
    model = build_tiny(form=form, scheme=scheme)
    save(model, tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    assert {(s.spec.form, s.spec.scheme) for s in loaded.stages.values()} == {(form, scheme)}


def test_what_a_file_says_besides_stages_survives(tiny: OdeResNet, tmp_path):
    tiny.info = replace(tiny.info, left_out=("layer9 (Block) writes to its input",))
    tiny.info = tiny.info.with_classes("abcde").with_command("convert", form="exact").with_command("tie", rule="mean")
    save(tiny, tmp_path / "model.safetensors")
    info = load(tmp_path / "model.safetensors").info
    assert info.class_names == ("a", "b", "c", "d", "e")
    assert [entry["command"] for entry in info.history] == ["convert", "tie"]
    assert info == tiny.info


def test_a_file_of_before_blocks_left_out_were_named_loads(saved: Path):
    rewrite(saved, lambda tensors, metadata: metadata.pop("left_out"))
    assert load(saved).info.left_out == ()


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_tensor_is_held_twice(variant: str, tiny: OdeResNet, tmp_path):
    save(apply(tiny, *VARIANTS[variant]), tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors")
    names = Counter(id(p) for _, p in loaded.named_parameters(remove_duplicate=False))
    pointers = Counter(p.data_ptr() for p in loaded.parameters())
    assert set(names.values()) == set(pointers.values()) == {1}


def test_replication_costs_no_space_in_the_file(tiny: OdeResNet, tmp_path):
    save(tiny, tmp_path / "native.safetensors")
    save(apply(tiny, lambda s: deepen(s, 40)), tmp_path / "deep.safetensors")
    with (
        safe_open(tmp_path / "native.safetensors", framework="pt") as native,
        safe_open(tmp_path / "deep.safetensors", framework="pt") as deep,
    ):
        assert set(native.keys()) == set(deep.keys())


def edit_stage(**fields: Any) -> Change:
    return lambda tensors, metadata: metadata["stages"][1].update(fields)


# A change to a good file, and what the refusal must name.
BROKEN: dict[str, tuple[Change, str]] = {
    "newer format": (lambda t, m: m.update(format=99), "format version 99, newer"),
    "format is text": (lambda t, m: m.update(format="two"), "format version two"),
    "no format": (lambda t, m: m.pop("format"), "metadata cannot be read"),
    "no stages": (lambda t, m: m.pop("stages"), "metadata is inconsistent.*stages"),
    "no history": (lambda t, m: m.pop("history"), "metadata is inconsistent.*history"),
    "unknown field": (edit_stage(colour="red"), "metadata is inconsistent.*colour"),
    "schedule too high": (edit_stage(schedule=[0, 2]), "stage layer2: schedule out of range"),
    "schedule negative": (edit_stage(schedule=[0, -1]), r"stage layer2.schedule\[1\]: -1 is no whole number"),
    "schedule not whole": (edit_stage(schedule=[0, 0.5]), r"stage layer2.schedule\[1\]: 0.5 is no whole number"),
    "unused block": (edit_stage(schedule=[0, 0]), "stage layer2: a block is not in the schedule"),
    "unknown rule": (edit_stage(scheme="rk5"), "stage layer2.scheme: unknown forward rule 'rk5'"),
    "unknown form": (edit_stage(form="post"), "stage layer2.form: unknown form 'post'"),
    "horizon": (edit_stage(horizon="long"), "metadata is inconsistent.*long"),
    "horizon by zero": (edit_stage(horizon="1/0"), "metadata is inconsistent"),
    "unknown container": (edit_stage(container="layer9"), "layer9"),
    "unknown transition": (edit_stage(transition=["7"]), "stage layer2: .*no block '7'"),
    "unknown origin": (
        edit_stage(blocks=[{"name": "1", "origin": "8"}, {"name": "2", "origin": "2"}]),
        "stage layer2: .*no block '8'",
    ),
    "two blocks of one name": (edit_stage(blocks=[{"name": "1", "origin": "1"}, {"name": "1", "origin": "2"}]), "'1'"),
    "two stages of one name": (edit_stage(name="layer1"), "layer1"),
    "unknown library": (lambda t, m: m["source"].update(library="keras"), "library 'keras'"),
    "unknown network": (lambda t, m: m["source"].update(library="cifar", name="resnet21"), "resnet21.*resnet20"),
    "another network": (lambda t, m: m["source"].update(library="cifar", name="resnet20"), "wrong shape|block"),
    "missing tensor": (lambda t, m: t.pop("layer2.1.conv1.weight"), r"1 missing: layer2\.1\.conv1\.weight"),
    "unexpected tensor": (lambda t, m: t.update(extra=torch.zeros(1)), "1 unexpected: extra"),
    "wrong shape": (
        lambda t, m: t.update({"linear.bias": torch.zeros(6)}),
        r"1 wrong shape: linear\.bias \(6,\) instead of \(5,\)",
    ),
    "state of a run": (lambda t, m: m.update(run={"step": 3}), "the state of a run, not a model"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_an_inconsistent_file_is_refused_by_name(kind: str, saved: Path):
    change, message = BROKEN[kind]
    rewrite(saved, change)
    with pytest.raises(ResodeError, match=rf"model\.safetensors: .*({message})"):
        load(saved)


def test_the_rewriting_of_these_tests_alone_breaks_nothing(saved: Path):
    rewrite(saved, lambda tensors, metadata: None)
    load(saved)


@pytest.mark.parametrize("kept", [0, 4, 60, -1])
def test_a_file_cut_short_is_refused(kept: int, saved: Path):
    saved.write_bytes(saved.read_bytes()[:kept])
    with pytest.raises(ResodeError, match=r"model\.safetensors: not a safetensors file, or cut short"):
        load(saved)


def test_safetensors_of_another_program_are_refused(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors", metadata={"format": "pt"})
    with pytest.raises(ResodeError, match=r"other\.safetensors: .*not a resode model"):
        load(tmp_path / "other.safetensors")


def test_metadata_that_is_not_json_is_refused(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors", metadata={"resode": "{"})
    with pytest.raises(ResodeError, match="metadata cannot be read"):
        load(tmp_path / "model.safetensors")


def test_a_missing_file_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="'.*none.safetensors' does not exist"):
        load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("bug"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(error, tiny, saved: Path, tmp_path, monkeypatch):
    before, listing = saved.read_bytes(), sorted(os.listdir(tmp_path))

    def fail(tensors, path, metadata):
        Path(path).write_bytes(b"half a file")
        raise error

    monkeypatch.setattr(model_file, "save_file", fail)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else ResodeError) as caught:
        save(apply(tiny, tie), saved)
    assert saved.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == listing
    if isinstance(error, OSError):
        assert "cannot be written: no room on the disk (it needs" in str(caught.value)


def test_a_written_file_has_the_usual_permissions(saved: Path):
    umask = os.umask(0)
    os.umask(umask)
    assert saved.stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_moved_source_file_is_named_and_can_be_given(tiny, tiny_file: Path, saved: Path, images, tmp_path):
    moved = tmp_path / "elsewhere" / "renamed.py"
    moved.parent.mkdir()
    tiny_file.rename(moved)
    with pytest.raises(ResodeError, match=r"net\.py:make, which is not there any more; pass --source"):
        load(saved)
    with torch.no_grad():
        assert torch.equal(load(saved, source=f"{moved}:make")(images), tiny(images))


def test_a_source_file_that_has_changed_since_is_refused(tiny_file: Path, saved: Path):
    tiny_file.write_text(tiny_file.read_text().replace("(4, 8, 8)", "(4, 8, 6)"))
    with pytest.raises(ResodeError, match=r"model\.safetensors: .*wrong shape.*layer3"):
        load(saved)


def test_metadata_says_what_the_file_is(saved: Path):
    metadata = read_metadata(saved)
    assert metadata["format"] == 4
    assert [stage["name"] for stage in metadata["stages"]] == ["layer1", "layer2", "layer3"]
    assert metadata["num_classes"] == 5 and metadata["preprocessing"]["size"] == 16


def test_an_output_that_exists_needs_force(saved: Path):
    with pytest.raises(ResodeError, match="exists; pass --force"):
        check_output(saved, force=False)
    check_output(saved, force=True)


def test_a_new_output_in_a_folder_that_is_there_is_allowed(tmp_path):
    check_output(tmp_path / "new.safetensors", force=False)
    assert not (tmp_path / "new.safetensors").exists()


@pytest.mark.parametrize("force", [False, True])
def test_an_output_that_cannot_be_is_refused(force: bool, tmp_path):
    with pytest.raises(UsageError, match="is a folder"):
        check_output(tmp_path, force=force)
    with pytest.raises(UsageError, match="output folder '.*nowhere' does not exist"):
        check_output(tmp_path / "nowhere" / "model.safetensors", force=force)
