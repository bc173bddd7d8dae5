"""The table behind `resode list`, held against the installed libraries."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from resode_cli.app import main
from resode_cli.errors import ResodeError, UsageError
from resode_cli.sources import catalog

sys.path.insert(0, str(Path(__file__).parents[1] / "zoo"))
survey = importlib.import_module("survey")
REMAKE = "run `python tests/zoo/survey.py`"


def every() -> dict[str, catalog.Row | catalog.Refusal]:
    found: list[catalog.Row | catalog.Refusal] = [*catalog.rows(), *catalog.refusals()]
    return {row.source: row for row in found}


def test_it_has_every_architecture_of_the_installed_versions():
    assert set(every()) == set(survey.sources()), REMAKE


def test_its_families_and_tags_are_those_of_the_installed_versions():
    for source, row in every().items():
        assert row.family == survey.family(source), REMAKE
    for row in catalog.rows():
        assert list(row.tags) == survey.tags(row.source), REMAKE


def test_the_core_families_are_there_in_full():
    core = {"resnet", "res2net", "resnest", "sknet", "resnetv2", "senet", "regnet", "byobnet", "byoanet", "tresnet"}
    counts = {
        library: sum(row.family in core | {"nfnet"} for row in catalog.rows(f"{library}:*"))
        for library in ("timm", "torchvision")
    }
    assert counts["timm"] >= 254 and counts["torchvision"] == 25


@pytest.mark.parametrize(
    "source",
    ["timm:resnet18", "timm:gernet_l", "timm:regnety_032", "timm:vit_tiny_patch16_224", "torchvision:resnet50"],
)
def test_rows_are_what_a_survey_finds(source: str):
    (row,) = [row for row in catalog.rows(source) if row.source == source]
    assert survey.row(source) == {**vars(row), "steps": list(row.steps), "tags": list(row.tags)}


@pytest.mark.parametrize("source", ["timm:dla34", "timm:regnetv_040", "timm:repvgg_a0", "timm:resnet14t"])
def test_refusals_are_what_a_survey_finds(source: str):
    (refusal,) = [refusal for refusal in catalog.refusals(source) if refusal.source == source]
    assert survey.row(source) == vars(refusal)


@pytest.mark.parametrize(
    ("pattern", "some"),
    [
        ("resnet50", {"timm:resnet50", "timm:resnet50d", "torchvision:resnet50"}),
        ("timm:resnet50", {"timm:resnet50", "timm:resnet50_gn"}),
        ("torchvision:*", {"torchvision:resnet18", "torchvision:vit_b_16"}),
        ("regnet", {"timm:regnety_032", "torchvision:regnet_y_400mf"}),
        ("*bit", {"timm:resnetv2_50x1_bit"}),
    ],
)
def test_patterns_match_sources_names_and_families(pattern: str, some: set[str]):
    found = {row.source for row in catalog.rows(pattern)}
    assert some <= found and "timm:convnext_atto" not in found


def test_what_is_not_there_is_answered_with_the_nearest_or_the_reason():
    with pytest.raises(UsageError, match="unknown architecture 'resnat50'; did you mean .*resnet50"):
        catalog.rows("resnat50")
    with pytest.raises(ResodeError, match="timm:dla34 cannot be converted: .*states are read by DlaRoot too"):
        catalog.rows("dla34")


def test_json_is_a_list_of_rows(capsys):
    assert main(["list", "torchvision:resnet18", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [
        {
            "source": "torchvision:resnet18",
            "family": "resnet",
            "parameters": 11689512,
            "steps": [2, 1, 1, 1],
            "tags": ["IMAGENET1K_V1"],
        }
    ]


def test_refusals_are_listed_with_their_reasons(capsys):
    assert main(["list", "--refused", "timm:dla*", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 12 and all("DlaRoot" in row["reason"] for row in rows)


def test_listing_needs_no_torch():
    code = "import sys; from resode_cli.app import main; main(['list', 'resnet*']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
