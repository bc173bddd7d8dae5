"""What a user may write for an adjoint and a memory budget, and how mistakes are answered."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from resode_cli.errors import UsageError
from resode_cli.gradients.adjoint_choice import parse_adjoint, parse_adjoints
from resode_cli.machine import memory as memory_budget
from resode_cli.ode import Adjoint


def test_each_method_of_a_list_may_have_settings_of_its_own():
    text = "auto,multistep:anchors=20,pc:anchors=none:corrections=2,checkpoint:snapshots=12,euler:anchors=auto"
    auto, multistep, pc, checkpoint, euler = parse_adjoints(text)
    assert (auto.fixed, auto.methods) == (None, None)
    assert multistep.fixed == Adjoint("multistep", 20)
    assert pc.fixed == Adjoint("pc", corrections=2)
    assert checkpoint.fixed == Adjoint("checkpoint", snapshots=12)
    assert (euler.fixed, euler.methods) == (None, ("euler",))


def test_keywords_hold_for_the_methods_that_take_them():
    found = parse_adjoints("backprop,checkpoint,pc,euler:anchors=3", anchors="10", corrections=1)
    assert [choice.fixed for choice in found] == [
        Adjoint("backprop"),
        Adjoint("checkpoint", 10),
        Adjoint("pc", 10, 1),
        Adjoint("euler", 3, 1),
    ]


@pytest.mark.parametrize(
    ("text", "settings", "words"),
    [
        ("mutlistep", {}, "did you mean multistep"),
        ("pc:anchor=3", {}, "did you mean anchors"),
        ("pc:anchors=x", {}, "write a number of steps, 'auto' or 'none'"),
        ("pc:anchors=0", {}, "1 or more"),
        ("pc:anchors=3:anchors=4", {}, "anchors is given twice"),
        ("auto:anchors=3", {}, "chooses its own"),
        ("checkpoint:anchors=none", {}, "needs some"),
        ("checkpoint:anchors=3:snapshots=2", {}, "not both"),
        ("pc:snapshots=2", {}, "takes anchors"),
        ("checkpoint", {"corrections": 2}, "none of checkpoint takes corrections"),
        ("auto", {"anchors": "3"}, "none of auto takes anchors"),
        ("pc", {"snapshots": 3}, "none of pc takes snapshots"),
    ],
)
def test_mistakes_are_answered(text, settings, words):
    with pytest.raises(UsageError, match=words):
        parse_adjoints(text, **settings)


def test_an_entry_for_a_stage_is_told_where_it_belongs():
    with pytest.raises(UsageError, match=r"'layer3=euler': methods are compared on all stages here; `resode finetune`"):
        parse_adjoints("pc,layer3=euler")


def test_auto_by_itself_refuses_what_it_chooses():
    with pytest.raises(UsageError, match="chooses its own"):
        parse_adjoint("auto", corrections=1)


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch):
    (tmp_path / "max").write_text("3000000\n")
    (tmp_path / "current").write_text("1000000\n")
    monkeypatch.setattr(memory_budget, "CGROUPS", ((str(tmp_path / "max"), str(tmp_path / "current")),))
    assert memory_budget.free_bytes(torch.device("cpu")) == 2_000_000
    (tmp_path / "max").write_text("max\n")
    assert memory_budget.free_bytes(torch.device("cpu")) > 2_000_000
