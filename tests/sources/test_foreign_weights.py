"""Weights that other programs saved: loaded whole, with a word on what was left out, or refused with what to do."""

from __future__ import annotations

import argparse
import collections
import functools
import pathlib
import re
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from resode_cli.errors import ResodeError, UsageError
from resode_cli.sources.cifar import CifarResNet
from resode_cli.sources.registry import open_source
from resode_cli.sources.weights import load_weights

State = dict[str, Tensor]


def tiny(num_classes: int = 5) -> CifarResNet:
    return CifarResNet(2, num_classes=num_classes, widths=(4, 8, 8))


@pytest.fixture
def state(randomise) -> State:
    return randomise(tiny()).state_dict()


@pytest.fixture
def lightning(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """A package that is there when the file is written, and gone when it is read."""
    module = types.ModuleType("trainer_of_others")

    class Config:
        def __init__(self, **values: object) -> None:
            self.__dict__.update(values)

    class AttributeDict(dict):
        pass

    class History(list):
        pass

    for kind in (Config, AttributeDict, History):
        kind.__module__, kind.__qualname__ = module.__name__, kind.__name__
        setattr(module, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    yield module


def other(state: State) -> State:
    return {key: value + 1 for key, value in state.items()}


def under(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def body(state: State) -> State:
    return {key: value for key, value in state.items() if not key.startswith("linear.")}


def timm_trainer(state: State) -> dict[str, Any]:
    optimizer = torch.optim.SGD(tiny().parameters(), 0.1, momentum=0.9)
    return {
        "epoch": 3,
        "arch": "resnet",
        "state_dict": state,
        "optimizer": optimizer.state_dict(),
        "version": 2,
        "args": argparse.Namespace(lr=0.1, model="resnet", img_size=None, path=pathlib.Path("runs")),
        "amp_scaler": {"scale": 2.0},
        "state_dict_ema": other(state),
        "metric": np.float64(91.5),
    }


# Each file's content, the notes' words (one per note), by the program that writes it.
LOADED: dict[str, tuple[Any, tuple[str, ...]]] = {
    "timm's trainer": (
        timm_trainer,
        ("'state_dict' is loaded; 'state_dict_ema' would fit too", r"left out: .*args \(argparse.Namespace\)"),
    ),
    "lightning": (
        lambda s: {"epoch": 1, "state_dict": under("model.", s), "callbacks": {}, "loops": {"fit": {"a": [1]}}},
        (),
    ),
    "lightning with a criterion": (
        lambda s: {
            "state_dict": {**under("net.", s), "criterion.weight": torch.ones(5), "metric.total": torch.ones(1)}
        },
        (r"names that begin with 'net.' are loaded; 2 others are left out \(criterion.weight, metric.total\)",),
    ),
    "stochastic weight averaging": (
        lambda s: {"n_averaged": torch.tensor(7), **under("module.", s)},
        (r"'module.' are loaded; 1 others are left out \(n_averaged\)",),
    ),
    "a contrastive backbone": (lambda s: {"state_dict": under("module.encoder_q.", s)}, ()),
    "a segmenter's backbone": (
        lambda s: {**under("backbone.", s), "decode_head.conv.weight": torch.ones(2)},
        (r"1 others are left out \(decode_head.conv.weight\)",),
    ),
    "nested wrappers": (lambda s: {"model": under("module._orig_mod.model.", s)}, ()),
    "a layer that was compiled": (
        lambda s: {key.replace("layer1.", "layer1._orig_mod."): value for key, value in s.items()},
        (),
    ),
    "sharded training": (
        lambda s: under(
            "_fsdp_wrapped_module.", {k.replace("bn1", "bn1._checkpoint_wrapped_module"): v for k, v in s.items()}
        ),
        (),
    ),
    "averaged beside trained": (
        lambda s: {"model": s, "model_ema": other(s)},
        ("'model' is loaded; 'model_ema' would fit too",),
    ),
    "parameters": (lambda s: {key: nn.Parameter(v, v.is_floating_point()) for key, v in s.items()}, ()),
    "other containers": (
        lambda s: {
            "weights": {"best": collections.OrderedDict(s)},
            "seen": {1, 2},
            "counts": collections.Counter("aab"),
        },
        (),
    ),
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("program", LOADED)
def test_the_weights_of_other_programs_are_loaded(program, legacy, state, tmp_path):
    content, told = LOADED[program]
    torch.save(content(state), tmp_path / "w.ckpt", _use_new_zipfile_serialization=not legacy)
    net = tiny()
    notes = load_weights(net, tmp_path / "w.ckpt", num_classes=None)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert len(notes) == len(told)
    for note, words in zip(notes, told, strict=True):
        assert re.search(words, note), note


CLASSES = ["Config", "AttributeDict", "History", "nested", "module"]


@pytest.mark.parametrize(
    ("kind", "legacy"), [*((kind, False) for kind in CLASSES), *((kind, True) for kind in CLASSES if kind != "module")]
)
def test_settings_of_classes_that_are_not_here_are_left_out_and_named(
    kind, legacy, state, lightning, tmp_path, monkeypatch
):
    made = {
        "Config": lambda: lightning.Config(lr=0.1, nested=lightning.Config(a=[torch.ones(2)])),
        "AttributeDict": lambda: lightning.AttributeDict(lr=0.1, betas=(0.9, 0.99)),
        "History": lambda: lightning.History([1, 2]),
        "nested": lambda: lightning.Config(optimizer=lightning.History([lightning.AttributeDict(a=1)])),
        "module": lambda: nn.Linear(2, 2),
    }[kind]()
    name = f"{type(made).__module__}.{type(made).__name__}"
    content = {"state_dict": under("model.", state), "hyper_parameters": made}
    torch.save(content, tmp_path / "w.ckpt", _use_new_zipfile_serialization=not legacy)
    monkeypatch.delitem(sys.modules, lightning.__name__)
    net = tiny()
    (note,) = load_weights(net, tmp_path / "w.ckpt", num_classes=None)
    assert f"hyper_parameters ({name})" in note
    assert torch.equal(net.conv1.weight, state["conv1.weight"]) and lightning.__name__ not in sys.modules


@pytest.mark.parametrize("what", [functools.partial(print, 1), print, exec, sys.exit], ids=repr)
def test_what_would_run_is_refused_even_among_settings(what, state, tmp_path):
    torch.save({"state_dict": state, "hyper_parameters": {"x": what}}, tmp_path / "w.ckpt")
    with pytest.raises(ResodeError, match="could run code"):
        load_weights(tiny(), tmp_path / "w.ckpt", num_classes=None)


def test_an_old_file_with_a_network_in_it_is_refused(state, tmp_path):
    """There, torch wrote a module's source beside it, and reads none without running it."""
    torch.save({"state_dict": state, "x": tiny()}, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(ResodeError, match="save its state_dict alone"):
        load_weights(tiny(), tmp_path / "w.pth", num_classes=None)


WHOLE = {
    "the network": lambda net: net,
    "in an entry": lambda net: {"epoch": 1, "model": net},
    "of another program's": lambda net: {"ema": net.half(), "train_args": {"lr": 0.1}},
}


@pytest.mark.parametrize("kind", WHOLE)
def test_a_pickled_network_is_refused_with_how_to_save_it(kind, tmp_path):
    torch.save(WHOLE[kind](tiny()), tmp_path / "w.pt")
    with pytest.raises(
        ResodeError, match=r"pickled resode_cli.sources.cifar.CifarResNet, whole: .*state_dict alone"
    ) as e:
        load_weights(tiny(), tmp_path / "w.pt", num_classes=None)
    assert "\n" not in str(e.value)


SEVERAL = {
    "momentum": (
        lambda s: {"state_dict": {**under("encoder_q.", s), **under("encoder_k.", other(s)), "queue": torch.ones(3)}},
        ("state_dict.encoder_q", "state_dict.encoder_k"),
        ("encoder_q.", "encoder_q", "state_dict.encoder_q"),
    ),
    "teacher and student": (
        lambda s: {"teacher": under("backbone.", other(s)), "student": under("backbone.", s)},
        ("teacher.backbone", "student.backbone"),
        ("student", "student.backbone", "student.backbone."),
    ),
    "two networks": (
        lambda s: {**under("a.net.", s), **under("b.net.", other(s))},
        ("a.net", "b.net"),
        ("a.net", "a.net."),
    ),
}


@pytest.mark.parametrize("kind", SEVERAL)
def test_several_weights_that_fit_need_a_prefix(kind, state, tmp_path):
    content, labels, given = SEVERAL[kind]
    torch.save(content(state), tmp_path / "w.pth")
    with pytest.raises(UsageError, match="several weights in it fit; say which with --prefix") as caught:
        load_weights(tiny(), tmp_path / "w.pth", num_classes=None)
    assert all(repr(label) in str(caught.value) for label in labels)
    for prefix in given:
        net = tiny()
        load_weights(net, tmp_path / "w.pth", num_classes=None, prefix=prefix)
        assert torch.equal(net.conv1.weight, state["conv1.weight"])
    with pytest.raises(UsageError, match="unknown prefix in w.pth 'encoder_x'"):
        load_weights(tiny(), tmp_path / "w.pth", num_classes=None, prefix="encoder_x")


def test_a_prefix_takes_what_would_not_be_taken_by_itself(state, tmp_path):
    torch.save(timm_trainer(state), tmp_path / "w.pth.tar")
    net = tiny()
    notes = load_weights(net, tmp_path / "w.pth.tar", num_classes=None, prefix="state_dict_ema")
    assert torch.equal(net.conv1.weight, state["conv1.weight"] + 1) and "'state_dict_ema' is loaded" in notes[0]


def test_a_prefix_whose_weights_do_not_fit_says_what_is_missing(state, tmp_path):
    torch.save({"state_dict": {**state, **under("old.", body(state))}}, tmp_path / "w.pth")
    with pytest.raises(ResodeError, match="does not fit CifarResNet: 2 missing: linear.weight, linear.bias"):
        load_weights(tiny(), tmp_path / "w.pth", num_classes=None, prefix="old")


def test_a_prefix_without_weights_is_a_usage_error(tiny_file):
    with pytest.raises(UsageError, match="--prefix model: goes with --weights"):
        open_source(f"{tiny_file}:make", prefix="model")


BACKBONES = {
    "bare": (lambda s: body(s), ()),
    "with a projection": (
        lambda s: {**body(s), "linear.0.weight": torch.ones(3, 8), "linear.2.weight": torch.ones(2, 3)},
        (r"what follows the backbone is left out \(linear.0.weight, linear.2.weight\)",),
    ),
    "beside a projector": (
        lambda s: {"state_dict": {**under("backbone.", body(s)), "projector.weight": torch.ones(3)}},
        (r"1 others are left out \(projector.weight\)",),
    ),
    "under another name": (lambda s: {**body(s), "head.weight": torch.ones(3)}, (r"left out \(head.weight\)",)),
}


@pytest.mark.parametrize("kind", BACKBONES)
def test_a_backbone_gets_a_new_head_where_classes_are_asked_for(kind, state, tmp_path):
    content, told = BACKBONES[kind]
    torch.save(content(state), tmp_path / "w.pth")
    net = tiny(3)
    initial = net.linear.weight.clone()
    notes = load_weights(net, tmp_path / "w.pth", num_classes=3)
    assert torch.equal(net.linear.weight, initial) and torch.equal(net.conv1.weight, state["conv1.weight"])
    assert sum("w.pth has no head: 'linear' starts at random for 3 classes" in note for note in notes) == 1
    assert len(notes) == 1 + len(told)
    for words in told:
        assert any(re.search(words, note) for note in notes)


def test_a_backbone_alone_hints_at_num_classes(state, tmp_path):
    torch.save(body(state), tmp_path / "w.pth")
    with pytest.raises(
        ResodeError, match="2 missing: .*a backbone without a head: --num-classes K starts one at random"
    ):
        load_weights(tiny(), tmp_path / "w.pth", num_classes=None)


def test_weights_of_another_network_name_what_comes_closest(state, tmp_path):
    deep = CifarResNet(3, num_classes=5, widths=(4, 8, 8)).state_dict()
    torch.save(
        {"state_dict": under("model.", state), "optimizer": {"state": {0: {"a": torch.ones(1)}}}}, tmp_path / "w.pth"
    )
    net = CifarResNet(3, num_classes=5, widths=(4, 8, 8))
    missing = len([k for k in deep if k not in state and "tracked" not in k])
    with pytest.raises(ResodeError, match=f"does not fit CifarResNet: {missing} missing: layer1.2"):
        load_weights(net, tmp_path / "w.pth", num_classes=None)


@pytest.mark.parametrize("prefix", ["encoder_q", "module.encoder_q", "state_dict.module.encoder_q", "encoder_q."])
def test_a_prefix_may_be_the_end_of_what_stands_before_the_names(prefix: str, tmp_path: pathlib.Path) -> None:
    net = CifarResNet(1, widths=(2, 4, 4))
    other = CifarResNet(1, widths=(2, 4, 4))
    both = {f"module.encoder_q.{k}": v for k, v in net.state_dict().items()}
    both |= {f"module.encoder_k.{k}": v for k, v in other.state_dict().items()}
    torch.save({"state_dict": both}, tmp_path / "moco.pth")
    found = CifarResNet(1, widths=(2, 4, 4))
    load_weights(found, tmp_path / "moco.pth", num_classes=None, prefix=prefix)
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in found.state_dict().items())
