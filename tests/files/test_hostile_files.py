"""Model files that are damaged or made to harm: each is refused in one line, or is the very model that was written."""

from __future__ import annotations

import copy
import errno
import json
import math
import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from resode_cli.app import main
from resode_cli.errors import NonFiniteWarning, ResodeError
from resode_cli.files import model_file
from resode_cli.files.model_file import load, save
from resode_cli.machine import atomic
from resode_cli.network.model import OdeResNet

Metadata = dict[str, Any]


@pytest.fixture(scope="module")
def written(make_pico: Callable[[Path], OdeResNet], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    save(make_pico(folder), folder / "model.safetensors")
    return folder / "model.safetensors"


@pytest.fixture(scope="module")
def weights(written: Path) -> list[Tensor]:
    return list(load(written, trust_source=True).state_dict().values())


@pytest.fixture
def saved(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(written, tmp_path))


def parts(path: Path) -> tuple[dict[str, Tensor], Metadata]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["resode"])


def write(path: Path, tensors: dict[str, Tensor], metadata: Metadata, *, signed: bool = True) -> None:
    """A file whose metadata somebody chose; signed: with the checksum that belongs to it, which anybody can compute."""
    metadata.pop("checksum", None)
    if signed:
        metadata["checksum"] = model_file.checksum(tensors, metadata)
    save_file(tensors, path, metadata={"resode": json.dumps(metadata)})


def stage(**fields: Any) -> Callable[[Metadata], Any]:
    return lambda m: m["stages"][0].update(fields)


def prepared(**fields: Any) -> Callable[[Metadata], Any]:
    return lambda m: m["preprocessing"].update(fields)


HARMFUL: dict[str, tuple[Callable[[Metadata], Any], str]] = {
    "a horizon that never ends": (stage(horizon="1e99999999"), "horizon"),
    "a horizon of many digits": (stage(horizon="9" * 10_000), "horizon"),
    "a horizon of 0": (stage(horizon="0"), "horizon of 0"),
    "a horizon below 0": (stage(horizon="-3"), "horizon"),
    "a horizon that is a number": (stage(horizon=3.0), "horizon"),
    "very many steps": (stage(schedule=[0] * 300_000, blocks=[{"name": "0", "origin": "0"}]), "schedule"),
    "very many blocks": (stage(blocks=[{"name": str(i), "origin": "0"} for i in range(100_001)]), "blocks"),
    "a step of 2^80": (stage(schedule=[2**80, 1]), "schedule"),
    "a schedule of truths": (stage(schedule=[False, True]), "schedule"),
    "a schedule that is text": (stage(schedule="01"), "schedule"),
    "a name with control characters": (stage(name="\x1b[2Jlayer1"), "name of a module"),
    "a name that is a number": (stage(name=1), "name"),
    "a container that is a list": (stage(container=["layer1"]), "container"),
    "classes beyond memory": (lambda m: m["source"].update(arguments={"num_classes": 10**9}), "num_classes"),
    "classes that no tensor has": (lambda m: m["source"].update(arguments={"num_classes": 10**7}), "no tensor has"),
    "no classes": (lambda m: m.update(num_classes=0), "num_classes"),
    "classes that are true": (lambda m: m.update(num_classes=True), "num_classes"),
    "other names than classes": (lambda m: m.update(class_names=["a", "b"]), "2 names of 10 classes"),
    "names that are numbers": (lambda m: m.update(class_names=list(range(10))), "class_names"),
    "images beyond memory": (prepared(size=10**6), "size"),
    "images of no size": (prepared(size=0), "size"),
    "a deviation of 0": (prepared(std=[1.0, 0.0, 1.0]), "std"),
    "a mean that is no number": (prepared(mean=[math.nan, 0.0, 0.0]), "mean"),
    "an infinite mean": (prepared(mean=[math.inf, 0.0, 0.0]), "mean"),
    "more means than deviations": (prepared(mean=[0.0] * 4), "channels"),
    "a crop of more than all": (prepared(crop_fraction=1.5), "crop_fraction"),
    "an unknown field": (lambda m: m.update(hook="os.system"), "unknown 'hook'"),
    "a history without commands": (lambda m: m.update(history=[{}]), "history"),
    "lists in lists": (lambda m: m.update(history=[nested(500)]), "cannot be read|too deep"),
    "a library that is a list": (lambda m: m["source"].update(library=["file"]), "library"),
    "arguments that are a list": (lambda m: m["source"].update(arguments=["x"]), "arguments"),
    "a number of 70 bits": (lambda m: m["source"].update(arguments={"width": 2**70}), "64 bits"),
    "format 0": (lambda m: m.update(format=0), "format"),
    "format true": (lambda m: m.update(format=True), "format"),
}


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return {"command": "x", "value": value}


@pytest.mark.parametrize("kind", HARMFUL)
def test_metadata_is_not_believed(kind: str, saved: Path) -> None:
    change, named = HARMFUL[kind]
    tensors, metadata = parts(saved)
    change(metadata)
    write(saved, tensors, metadata)
    with pytest.raises(ResodeError, match=named) as caught:
        load(saved)
    assert len(str(caught.value)) < 500


def test_signing_alone_breaks_nothing(saved: Path) -> None:
    write(saved, *parts(saved))
    load(saved)


def test_a_name_that_stands_twice_is_refused(saved: Path) -> None:
    tensors, metadata = parts(saved)
    text = json.dumps(metadata).replace('"num_classes": 10', '"num_classes": 10, "num_classes": 5')
    save_file(tensors, saved, metadata={"resode": text})
    with pytest.raises(ResodeError, match="metadata cannot be read"):
        load(saved)


TENSORS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "complex": (lambda t: t.to(torch.complex64), "complex64 instead of float32"),
    "whole": (lambda t: t.to(torch.int32), "int32 instead of float32"),
    "truths": (lambda t: t > 0, "bool instead of float32"),
    "double": (lambda t: t.double(), "float64 instead of float32"),
    "negative variance": (lambda t: -t - 1, "variance below 0"),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_of_another_kind_are_refused_by_name(kind: str, saved: Path) -> None:
    change, named = TENSORS[kind]
    tensors, metadata = parts(saved)
    name = "layer1.0.bn1.running_var"
    tensors[name] = change(tensors[name])
    write(saved, tensors, metadata)
    with pytest.raises(ResodeError, match=f"{named}.*|.*{named}") as caught:
        load(saved)
    assert name in str(caught.value)


def test_a_network_in_double_precision_stays_one(pico: OdeResNet, tmp_path: Path) -> None:
    save(pico.double(), tmp_path / "double.safetensors")
    loaded = load(tmp_path / "double.safetensors")
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(loaded(images), pico.eval()(images))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("command", ["info", "check-grad", "deepen"])
def test_weights_that_are_no_numbers_are_said(command: str, value: float, pico: OdeResNet, tmp_path: Path, capsys: Any):
    with torch.no_grad():
        next(pico.parameters())[0] = value
    path = tmp_path / "bad.safetensors"
    save(pico, path)
    with pytest.warns(NonFiniteWarning, match="holds NaN or infinity in conv1.weight"):
        load(path)
    more = {"check-grad": ["--adjoint", "checkpoint", "--images", "2"], "deepen": ["--blocks", "3"]}.get(command, [])
    out = ["-o", str(tmp_path / "out.safetensors")] if command == "deepen" else []
    main([command, str(path), *more, *out])
    assert f"warning: {path} holds NaN or infinity in conv1.weight" in capsys.readouterr().err


@pytest.mark.parametrize("seed", range(8))
def test_a_flipped_bit_is_noticed(seed: int, saved: Path) -> None:
    data = bytearray(saved.read_bytes())
    header = struct.unpack("<Q", data[:8])[0] + 8
    place = random.Random(seed).randrange(header, len(data))
    data[place] ^= 1 << seed
    saved.write_bytes(data)
    with pytest.raises(ResodeError, match="checksum does not agree"):
        load(saved)


def mutated(data: bytes, metadata: Metadata, chance: random.Random) -> tuple[str, bytes | Metadata]:
    """One change, of bytes anywhere or of one value of the metadata."""
    kind = chance.choice(["bit", "cut", "insert", "swap", "value", "value", "value", "drop", "add"])
    place = chance.randrange(min(len(data), 4000)) if chance.random() < 0.7 else chance.randrange(len(data))
    if kind == "bit":
        return kind, data[:place] + bytes([data[place] ^ (1 << chance.randrange(8))]) + data[place + 1 :]
    if kind == "cut":
        return kind, data[:place]
    if kind == "insert":
        return kind, data[:place] + chance.randbytes(3) + data[place:]
    if kind == "swap":
        return kind, data[:place] + chance.randbytes(8) + data[place + 8 :]
    changed = copy.deepcopy(metadata)
    spots = list(places(changed))
    owner, key = chance.choice(spots)
    if kind == "drop":
        del owner[key]
    elif kind == "add":
        owner.append(HOSTILE[0]) if isinstance(owner, list) else owner.update({chance.choice(["x", "", "\x1b"]): None})
    else:
        owner[key] = chance.choice(HOSTILE)
    return kind, changed


HOSTILE = [None, True, -1, 0, 2**40, 2**70, 1e308, math.nan, "", "\x1b[31m", "1e99999999", [], {}, [[]], "a" * 10_000]


def places(value: Any) -> Any:
    """Every place in a document that a value stands in."""
    for key, each in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(each, dict | list) and each:
            yield from places(each)


@pytest.mark.parametrize("seed", range(150))
def test_mutations_are_refused_or_change_nothing(seed: int, weights: list[Tensor], saved: Path) -> None:
    data, (tensors, metadata) = saved.read_bytes(), parts(saved)
    kind, change = mutated(data, metadata, random.Random(seed))
    if isinstance(change, bytes):
        saved.write_bytes(change)
    else:
        try:
            write(saved, tensors, change)
        except (TypeError, SafetensorError):  # it cannot even be written
            return
    try:
        after = load(saved)
    except ResodeError as error:
        assert "unexpected" not in str(error).lower().replace("unexpected:", "") and len(str(error)) < 1000, kind
        return
    assert all(torch.equal(a, b) for a, b in zip(weights, after.state_dict().values(), strict=True))


def test_a_file_written_before_there_were_checksums_loads(saved: Path) -> None:
    tensors, metadata = parts(saved)
    del metadata["left_out"]
    for version in (1, 2):
        write(saved, tensors, {**metadata, "format": version}, signed=False)
        assert load(saved).info.left_out == ()
    write(saved, tensors, metadata, signed=False)
    with pytest.raises(ResodeError, match="its checksum is missing"):
        load(saved)


# Writing.
def fail_with(error: Exception) -> Callable[..., None]:
    def save_file(tensors: object, path: Path, metadata: object) -> None:
        Path(path).write_bytes(b"half")
        raise error

    return save_file


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EFBIG, "File too large"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file data/3"),
    ],
    ids=["no space", "too large", "safetensors", "torch"],
)
def test_a_full_disk_is_named_with_what_it_needs(error: Exception, pico, saved: Path, monkeypatch: Any) -> None:
    before = saved.read_bytes()
    monkeypatch.setattr(model_file, "save_file", fail_with(error))
    with pytest.raises(ResodeError, match=r"cannot be written: no room .*it needs .*iB, and .* free"):
        save(pico, saved)
    assert saved.read_bytes() == before
    assert not list(saved.parent.glob(".*.tmp"))


def test_what_a_killed_writer_left_goes_and_nothing_else_does(pico, saved: Path) -> None:
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    host, dead = atomic._host(), int(gone.stdout)
    orphan = saved.with_name(f".{saved.name}.{host}-{dead}.abc.tmp")
    others = [
        saved.with_name(f".{saved.name}.{host}-{os.getppid()}.abc.tmp"),  # somebody writes
        saved.with_name(f".{saved.name}.another-{dead}.abc.tmp"),  # of another machine, on a shared disk
        saved.with_name(f".other.safetensors.{host}-{dead}.abc.tmp"),
        saved.with_name("notes.tmp"),
    ]
    for path in (orphan, *others):
        path.touch()
    save(pico, saved)
    assert not orphan.exists() and all(path.exists() for path in others)


def test_a_folder_given_as_a_model_names_the_models_in_it(saved: Path, capsys: Any) -> None:
    saved.rename(saved.with_name("best.safetensors"))
    saved.with_name("state.safetensors").touch()
    assert main(["info", str(saved.parent)]) == 2
    assert f"is a folder; did you mean {saved.parent / 'best.safetensors'}?" in capsys.readouterr().err


# Printing.
ESCAPES = "\x1b]0;title\x07\x1b[31mred\x9b2J\u202egnp\x7f[bold]b[/bold][/x]"


def test_text_of_a_file_reaches_the_terminal_escaped(pico: OdeResNet, tmp_path: Path, capsys: Any) -> None:
    info = pico.info.with_classes([ESCAPES + str(i) for i in range(10)]).with_command(ESCAPES, note=ESCAPES)
    pico.info = info
    path = tmp_path / "m.safetensors"
    save(pico, path)
    assert main(["info", str(path), "--history"]) == 0
    assert main(["info", str(tmp_path / ESCAPES.replace("/", ""))]) == 2
    shown = capsys.readouterr()
    for text in (shown.out, shown.err):
        assert not any(c in text for c in "\x1b\x07\x9b\x7f\u202e")
    assert "\\x1b]0;title" in shown.out and "[bold]b[/bold]" in shown.out


@pytest.mark.slow
def test_a_terminal_that_knows_ascii_alone(saved: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "resode_cli", "info", str(saved), "--trust-source"]
    result = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert result.returncode == 0 and b"layer1" in result.stdout and result.stdout.isascii(), result.stderr
