"""Every residual CNN of timm and torchvision up to 150 M parameters, converted and compared step by step.

`python -m pytest -m zoo tests/zoo` runs it, in a quarter of an hour on one core, and prints the counts per family.
"""

from __future__ import annotations

import copy

import pytest
import survey
import torch
from checks import converted, draw, steps_of_the_source
from torch import nn

from resode_cli.errors import ResodeError
from resode_cli.sources import catalog
from resode_cli.sources.find_stages import find_stages

pytestmark = pytest.mark.zoo

CORE = {
    "timm": "resnet res2net resnest sknet resnetv2 senet regnet byobnet byoanet tresnet nfnet".split(),
    "torchvision": ["resnet", "regnet"],
}
OTHERS = {
    "timm": "hrnet cspnet dla xception xception_aligned inception_resnet_v2 vovnet hgnet vision_transformer_hybrid"
    " mobilevit".split(),
    "torchvision": [],
}
LARGEST = 150e6
SIZES = (64, 128, 224, 256, 288, 384)


def belongs(row: catalog.Row | catalog.Refusal) -> bool:
    library = row.source.partition(":")[0]
    return row.family in (*CORE[library], *OTHERS[library])


ROWS = [row for row in catalog.rows() if belongs(row) and row.parameters <= LARGEST]
REFUSALS = [refusal for refusal in catalog.refusals() if belongs(refusal)]


def note(request: pytest.FixtureRequest, row: catalog.Row | catalog.Refusal, kind: str) -> None:
    library = row.source.partition(":")[0]
    group = "core" if row.family in CORE[library] else "other"
    request.node.user_properties += [("family", f"{group:5} {library} {row.family}"), ("kind", kind)]


def smallest(net: nn.Module, largest: int) -> int:
    """The smallest images that the network takes."""
    for size in SIZES:
        try:
            with torch.no_grad():
                net(draw(size))
        except (RuntimeError, AssertionError, ValueError):
            continue
        return size
    return largest


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.source)
def test_an_architecture_converts_exactly(row: catalog.Row, randomise, request):
    note(request, row, "converted")
    torch.manual_seed(0)
    net = randomise(survey.build(row.source)).eval()
    assert sum(p.numel() for p in net.parameters()) == row.parameters
    pixels = smallest(net, survey.size(row.source))
    model = converted(copy.deepcopy(net), pixels).eval()
    assert steps_of_the_source(model, net, pixels) == row.steps


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.source)
def test_a_refusal_names_its_reason(refusal: catalog.Refusal, request):
    note(request, refusal, "refused")
    net = survey.build(refusal.source).eval()
    with pytest.raises(ResodeError) as caught:
        find_stages(net, draw(smallest(net, survey.size(refusal.source)), images=1))
    assert refusal.reason in str(caught.value)
