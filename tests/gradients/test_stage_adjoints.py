"""Adjoints by stage, as a user writes them: what they say of each stage, and how mistakes are answered."""

from __future__ import annotations

import pytest

from resode_cli.errors import UsageError
from resode_cli.gradients.stage_adjoints import parse_adjoints_by_stage
from resode_cli.network.model import OdeResNet
from resode_cli.ode import Adjoint


def test_each_stage_goes_by_its_entry_and_the_others_by_the_one_without_a_name(tiny: OdeResNet):
    asked = parse_adjoints_by_stage(" pc : anchors=4 , 3 = euler,layer1=checkpoint:bits=4").with_names(tiny)
    assert asked.fixed(tiny) == {
        "stem": Adjoint("pc", 4),
        "layer1": Adjoint("checkpoint", bits=4),
        "layer2": Adjoint("pc", 4),
        "layer3": Adjoint("euler"),
    }
    assert not asked.chooses and asked.names_stages
    assert asked.text == "pc:anchors=4,layer1=checkpoint:bits=4,layer3=euler"
    assert parse_adjoints_by_stage(asked.text) == asked


def test_what_no_entry_names_goes_by_auto(tiny: OdeResNet):
    asked = parse_adjoints_by_stage("layer3=euler")
    assert asked.fixed(tiny) == {"layer3": Adjoint("euler")} and asked.chooses
    assert asked.of("layer1").label == "auto" and asked.text == "layer3=euler"
    one = parse_adjoints_by_stage("pc,layer2=auto")
    assert set(one.fixed(tiny)) == {"stem", "layer1", "layer3"} and one.chooses
    fitted = parse_adjoints_by_stage("pc:anchors=auto,layer2=euler").to_choose
    assert fitted is not None and fitted.methods == ("pc",)


def test_keywords_hold_for_the_entries_that_take_them(tiny: OdeResNet):
    asked = parse_adjoints_by_stage("pc,layer1=backprop,layer3=checkpoint", corrections=1, snapshots=3)
    assert asked.fixed(tiny) == {
        "stem": Adjoint("pc", corrections=1),
        "layer1": Adjoint("backprop"),
        "layer2": Adjoint("pc", corrections=1),
        "layer3": Adjoint("checkpoint", snapshots=3),
    }


@pytest.mark.parametrize(
    ("text", "settings", "words"),
    [
        ("layr3=euler", {}, r"unknown stage 'layr3'; did you mean layer3.*allowed: layer1, layer2, layer3, 1, 2, 3"),
        ("pc,4=euler", {}, "unknown stage '4'"),
        ("layer3=euler,layer3=pc", {}, "stage layer3 is given twice$"),
        ("3=euler,layer3=pc", {}, "stage layer3 is given twice, as 3 and as layer3"),
        ("pc,euler", {}, "pc and euler both name no stage; write STAGE=METHOD, as in pc,layer3=euler"),
        ("layer3=eulr", {}, "did you mean euler"),
        ("layer3:euler", {}, "write layer3=euler"),
        ("=euler", {}, "write STAGE=METHOD"),
        ("pc,layer3=", {}, "an entry has no method"),
        ("pc,", {}, "an entry has no method"),
        ("pc,layer3=euler:anchor=3", {}, "did you mean anchors"),
        ("pc,layer3=euler", {"snapshots": 3}, "--snapshots 3: none of pc,euler takes snapshots"),
        ("pc:anchors=4", {"anchors": "3"}, "--anchors 3: none of pc:anchors=4 takes anchors"),
        ("layer3=backprop", {"bits": 4}, "--bits 4: none of backprop takes bits"),
        ("layer3=pc:anchors=auto", {}, "one kind of plan, not 'auto' and 'pc, anchors auto'"),
    ],
)
def test_mistakes_are_answered(text: str, settings: dict[str, object], words: str, tiny: OdeResNet):
    with pytest.raises(UsageError, match=words):
        parse_adjoints_by_stage(text, **settings).with_names(tiny)


def test_the_model_takes_adjoints_by_stage_and_refuses_what_it_does_not_have(tiny: OdeResNet):
    tiny.use_adjoint({"layer3": Adjoint("euler")})
    assert {name: stage.adjoint.method for name, stage in tiny.stages.items()} == {
        "layer1": "backprop",
        "layer2": "backprop",
        "layer3": "euler",
    }
    with pytest.raises(UsageError, match="unknown part 'layr2'; did you mean layer2"):
        tiny.use_adjoint({"layer1": Adjoint("pc"), "layr2": Adjoint("pc")})
    assert tiny.stages["layer1"].adjoint == Adjoint("backprop")
