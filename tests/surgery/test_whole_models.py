"""tie, untie and deepen from Python: of a stage or a whole model, and what is given stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resode_cli as resode
from resode_cli.network.model import OdeResNet
from resode_cli.network.stage import OdeStage

REWRITES: dict[str, Callable] = {
    "tie": resode.tie,
    "tie with norms": lambda whole: resode.tie(whole, depth_weights="tied+norms"),
    "untie": resode.untie,
    "deepen": lambda whole: resode.deepen(whole, 6),
    "deepen to the same": lambda whole: resode.deepen(whole, 3),
    "linear": lambda whole: resode.deepen(whole, 6, depth_weights="linear"),
    "interpolate": lambda whole: resode.deepen(whole, 6, mode="interpolate"),
    "identity": lambda whole: resode.deepen(whole, 6, mode="identity"),
}


def tensors(module: nn.Module) -> set[int]:
    return {t.data_ptr() for t in (*module.parameters(), *module.buffers()) if t.numel()}


@pytest.mark.parametrize("rewrite", REWRITES)
@pytest.mark.parametrize("whole", ["model", "stage", "tied stage"])
def test_what_is_given_shares_nothing_with_what_comes_of_it(rewrite: str, whole: str, tiny: OdeResNet) -> None:
    given: Any = tiny if whole == "model" else tiny.stages["layer1"]
    if whole == "tied stage":
        given = resode.tie(given)
        if rewrite == "identity":
            given = resode.untie(given)
    before = {key: value.clone() for key, value in given.state_dict().items()}
    found = REWRITES[rewrite](given)
    assert type(found) is type(given) and found is not given
    assert not tensors(found) & tensors(given)
    with torch.no_grad():
        for p in found.parameters():
            p.add_(1)
    assert all(torch.equal(value, before[key]) for key, value in given.state_dict().items())


def test_a_model_is_deepened_stage_by_stage(tiny: OdeResNet, images: Tensor) -> None:
    deep = resode.deepen(tiny, 5, stages=["layer2", "3"])
    assert [stage.spec.depth for stage in deep.stages.values()] == [3, 5, 5]
    by_hand = resode.deepen(tiny.stages["layer2"], 5)
    assert isinstance(by_hand, OdeStage) and by_hand.spec == deep.stages["layer2"].spec
    assert [stage.spec.depth for stage in resode.deepen(tiny, 4).stages.values()] == [4, 4, 4]
    with torch.no_grad():
        assert torch.equal(resode.untie(tiny).eval()(images), tiny.eval()(images))
    with pytest.raises(resode.ResodeError, match="stage"):
        resode.tie(tiny, stages=["layer9"])
    with pytest.raises(ValueError, match="stages are named in a model"):
        resode.tie(tiny.stages["layer1"], stages=["layer1"])


def test_modules_that_stages_share_are_shared_in_the_copy(tiny: OdeResNet) -> None:
    """Weights of two stages that are one stay one, so that training moves them together."""
    first, second = (tiny.stages[name].blocks for name in ("layer2", "layer3"))
    second[0].bn1 = first[0].bn1
    deep = resode.deepen(tiny, 4)
    assert deep.stages["layer2"].blocks[0].bn1 is deep.stages["layer3"].blocks[0].bn1
    assert deep.stages["layer2"].blocks[0].bn1 is not first[0].bn1


def test_what_the_commands_do_can_be_done_from_python(tiny: OdeResNet, make_folder: Callable, tmp_path: Path) -> None:
    folder = str(make_folder(classes=tuple("abcde")))
    train, test = (resode.open_data(folder, tiny.info.preprocessing, split) for split in ("train", "test"))
    model = resode.deepen(tiny, 4)
    assert resode.recalibrate(model, resode.batches(train, 4)) == len(train)
    before = resode.evaluate(model, resode.batches(test, 4))
    settings = resode.Settings(max_steps=2, batch_size=4, adjoint="pc", lr=0.05)
    result = resode.finetune(model, train, test, out=tmp_path / "run", settings=settings)
    after = resode.evaluate(
        resode.load(tmp_path / "run" / "last.safetensors", trust_source=True), resode.batches(test, 4)
    )
    assert result.steps == 2 and before.images == after.images == len(test)
    assert after.loss != before.loss
