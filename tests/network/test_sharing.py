"""Blocks that share layers: tied but for norms, by identity, in memory, in a file and in an optimizer."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from resode_cli.data import Batch
from resode_cli.errors import ResodeError, UsageError
from resode_cli.files.model_file import load, save
from resode_cli.network.assembling import assemble
from resode_cli.network.model import OdeResNet
from resode_cli.network.parts import StageParts
from resode_cli.network.stage import OdeStage
from resode_cli.ode import Adjoint
from resode_cli.surgery.batch_norm import recalibrate
from resode_cli.surgery.convert import stage_specs
from resode_cli.surgery.rewrite import deepen, tie, untie
from resode_cli.training.optimization import create_optimizer
from resode_cli.training.settings import Settings

NORMS = ("bn1", "bn2")
REWRITES = {
    "linear": lambda stage: deepen(stage, 7, depth_weights="linear"),
    "tied+norms": lambda stage: deepen(stage, 7, depth_weights="tied+norms"),
    "tied+stats": lambda stage: deepen(stage, 7, depth_weights="tied+stats"),
}


@pytest.fixture
def stage(tiny: OdeResNet) -> OdeStage:
    """Three untied steps of 4 channels, no transition."""
    return tiny.stages["layer1"]


@pytest.fixture(params=REWRITES)
def shared(request, tiny: OdeResNet) -> OdeResNet:
    for name, stage in tiny.stages.items():
        tiny.replace_stage(name, REWRITES[request.param](stage))
    assert {stage.spec.kind for stage in tiny.stages.values()} == {request.param}
    return tiny.eval()


def of_norm(name: str) -> bool:
    return name.split(".")[0] in NORMS


def logits(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(x)


# tie, but for the norms


def test_tying_but_for_norms_shares_every_other_parameter_itself(stage: OdeStage):
    tied = tie(stage, depth_weights="tied+norms")
    assert tied.spec.kind == "tied+norms" and len(tied.blocks) == tied.spec.depth == 3
    for block in tied.blocks[1:]:
        for (name, first), (_, own) in zip(tied.blocks[0].named_parameters(), block.named_parameters(), strict=True):
            assert (own is first) is not of_norm(name), name


def test_every_step_keeps_its_norms_and_the_rest_is_the_mean(stage: OdeStage):
    for found, source in zip(tie(stage, depth_weights="tied+norms").blocks, stage.blocks, strict=True):
        for name, value in found.state_dict().items():
            if of_norm(name):
                assert torch.equal(value, source.state_dict()[name]), name
            else:
                mean = torch.stack([block.state_dict()[name] for block in stage.blocks]).mean(0)
                torch.testing.assert_close(value, mean, rtol=1e-5, atol=1e-7)


def test_the_number_of_parameters_is_one_block_and_the_norms_of_the_others(stage: OdeStage):
    # Two 3×3 convolutions of 4 channels; two norms of 2×4 numbers per step.
    assert sum(p.numel() for p in deepen(stage, 9, depth_weights="tied+norms").parameters()) == 288 + 9 * 16


def test_tying_but_for_norms_is_idempotent(stage: OdeStage):
    once = tie(stage, depth_weights="tied+norms")
    twice = tie(once, depth_weights="tied+norms")
    assert once.spec == twice.spec and len(list(once.parameters())) == len(list(twice.parameters()))
    assert all(torch.allclose(v, once.state_dict()[k], rtol=1e-6, atol=0) for k, v in twice.state_dict().items())


def test_tying_but_for_statistics_shares_every_parameter_and_no_buffer(stage: OdeStage):
    tied = tie(stage, depth_weights="tied+stats")
    assert tied.spec.kind == "tied+stats" and len(tied.blocks) == tied.spec.depth == 3
    first = tied.blocks[0]
    for found, source in zip(tied.blocks, stage.blocks, strict=True):
        for (name, own), (_, base) in zip(found.named_parameters(), first.named_parameters(), strict=True):
            assert own is base, name
            mean = torch.stack([block.get_parameter(name) for block in stage.blocks]).mean(0)
            torch.testing.assert_close(own, mean, rtol=1e-5, atol=1e-7)
        for name, buffer in found.named_buffers():
            assert torch.equal(buffer, source.get_buffer(name)), name
    assert sum(p.numel() for p in deepen(stage, 9, depth_weights="tied+stats").parameters()) == 288 + 16


def test_a_tied_stage_may_be_given_statistics_of_its_steps(stage: OdeStage):
    tied, x = tie(stage), torch.rand(2, 4, 8, 8)
    own = tie(tied, depth_weights="tied+stats")
    assert own.spec.kind == "tied+stats" and own.spec.depth == tied.spec.depth
    torch.testing.assert_close(logits(own, x), logits(tied, x))
    assert tie(own).spec.kind == "tied"


def test_statistics_by_step_are_those_of_the_states_that_the_step_sees(tiny: OdeResNet):
    """Large steps: in eval mode the network is the one of the batch's statistics only if each step has its own."""
    images = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in tiny.parameters():
            parameter.mul_(2.0)
    found = {}
    for kind in ("tied", "tied+stats"):
        model = tie(tiny, depth_weights=kind)
        recalibrate(model, [Batch(images, torch.zeros(64, dtype=torch.long))])
        with torch.no_grad():
            expected = copy.deepcopy(model).train()(images)
        found[kind] = float((logits(model, images) - expected).norm() / expected.norm())
    assert found["tied+stats"] < 0.02 < 0.2 < found["tied"]


def test_untying_keeps_the_function_and_breaks_the_sharing(stage: OdeStage):
    tied, x = tie(stage, depth_weights="tied+norms"), torch.rand(2, 4, 8, 8)
    free = untie(tied)
    assert free.spec.kind == "untied" and torch.equal(logits(free, x), logits(tied, x))
    before = copy.deepcopy(free.blocks[1].state_dict())
    with torch.no_grad():
        free.blocks[0].conv1.weight.zero_()
    assert all(torch.equal(value, before[name]) for name, value in free.blocks[1].state_dict().items())
    assert tied.blocks[0].conv1.weight.abs().max() > 0


def test_blocks_without_norms_are_refused(info):
    class Step(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x)

    net = nn.Sequential(nn.Sequential(Step(4, 4, 1), Step(4, 4, 1)))
    specs = stage_specs([StageParts("0", (), ("0", "1"))], scheme="euler", form="exact")
    with pytest.raises(UsageError, match="the blocks of stage 0 have no norms to keep; tie them without"):
        tie(assemble(net, specs, info).stages["0"], depth_weights="tied+norms")


@pytest.mark.parametrize("training", [False, True])
def test_checkpoints_give_the_gradient_of_backprop(training: bool, stage: OdeStage):
    tied = deepen(stage, 6, depth_weights="tied+norms").double().train(training)
    x, found = torch.rand(2, 4, 8, 8, dtype=torch.float64), []
    for adjoint in (Adjoint("backprop"), Adjoint("checkpoint", snapshots=2)):
        tied.use_adjoint(adjoint)
        tied.zero_grad()
        tied(x).square().sum().backward()
        found.append([p.grad for p in tied.parameters()])
    for plain, other in zip(*found, strict=True):
        assert plain.norm() > 0 and (plain - other).norm() <= 1e-10 * plain.norm()


# In an optimizer


def test_the_optimizer_holds_each_parameter_once(shared: OdeResNet):
    groups = create_optimizer(shared, Settings()).param_groups
    held = Counter(id(p) for group in groups for p in group["params"])
    assert held == Counter({id(p): 1 for _, p in shared.named_parameters(remove_duplicate=False)}.keys())
    assert set(held.values()) == {1}


# In a file


def test_a_file_holds_each_tensor_once(shared: OdeResNet, tmp_path: Path):
    save(shared, tmp_path / "net.safetensors")
    tensors = load_file(tmp_path / "net.safetensors")
    held = {id(t): t for t in (*shared.parameters(), *shared.buffers())}.values()
    assert len(tensors) == len(held)
    assert sum(t.nbytes for t in tensors.values()) == sum(t.nbytes for t in held)
    assert sum("conv1" in name for name in tensors if name.startswith("layer1")) == (
        1 if shared.stages["layer1"].spec.kind in ("tied+norms", "tied+stats") else 3
    )


FRESH = """
import sys, torch
from safetensors.torch import load_file, save_file
from resode_cli.files.model_file import load
torch.set_num_threads(1)
with torch.no_grad():
    save_file({"logits": load(sys.argv[1], trust_source=True)(load_file(sys.argv[2])["images"])}, sys.argv[3])
"""


@pytest.mark.slow
def test_another_process_computes_the_same_logits_bit_for_bit(shared: OdeResNet, images: Tensor, tmp_path: Path):
    paths = [tmp_path / f"{name}.safetensors" for name in ("net", "images", "logits")]
    save(shared, paths[0])
    save_file({"images": images}, paths[1])
    subprocess.run([sys.executable, "-c", FRESH, *map(str, paths)], check=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(load_file(paths[2])["logits"], logits(shared, images))
    finally:
        torch.set_num_threads(threads)


def test_a_loaded_network_is_trained_as_the_saved_one(shared: OdeResNet, images: Tensor, tmp_path: Path):
    save(shared, tmp_path / "net.safetensors")
    loaded = load(tmp_path / "net.safetensors")
    for model in (shared, loaded):
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(images).square().sum().backward()
        optimizer.step()
    start, state = load(tmp_path / "net.safetensors").state_dict(), shared.state_dict()
    for name, value in loaded.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-6, atol=1e-7)
        assert not torch.equal(value, start[name]), f"{name} did not move"
    if loaded.stages["layer1"].spec.kind in ("tied+norms", "tied+stats"):
        first, *others = loaded.stages["layer1"].blocks
        assert all(block.conv2.weight is first.conv2.weight for block in others)


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Write the file again with the metadata of its first stage changed in place."""
    with safe_open(path, framework="pt") as file:
        metadata = json.loads(file.metadata()["resode"])
    change(metadata["stages"][0])
    del metadata["checksum"]
    metadata["format"] = 2  # which had none
    save_file(load_file(path), path, metadata={"resode": json.dumps(metadata)})


# The rewrite, a change to its first stage, and what the refusal must name.
BROKEN: dict[str, tuple[str, Callable[[dict[str, Any]], None], str]] = {
    "too few blends": ("linear", lambda s: s["blends"].pop(), "stage layer1: weights linear in depth"),
    "too many blends": ("linear", lambda s: s["blends"].append(0.0), "stage layer1: weights linear in depth"),
    "a whole blend": ("linear", lambda s: s["blends"].__setitem__(1, 1.0), r"stage layer1.blends\[1\]: 1.0"),
    "a negative blend": ("linear", lambda s: s["blends"].__setitem__(1, -0.1), r"stage layer1.blends\[1\]: -0.1"),
    "a blend of nothing": ("linear", lambda s: s["blends"].__setitem__(1, math.nan), r"stage layer1.blends\[1\]: nan"),
    "a blend in words": ("linear", lambda s: s["blends"].__setitem__(1, "half"), "stage layer1|inconsistent"),
    "no upper knot": ("linear", lambda s: s["blends"].__setitem__(6, 0.5), "reach beyond its 3 blocks"),
    "an unused knot": ("linear", lambda s: s.update(blends=[]) or s.update(schedule=[0] * 7), "not in the schedule"),
    "a base that is not there": ("tied+norms", lambda s: s["blocks"][2].update(shares="9"), "shares .* of '9'"),
    "a base that is itself": ("tied+norms", lambda s: s["blocks"][2].update(shares=s["blocks"][2]["name"]), "shares"),
    "no sharing": ("tied+norms", lambda s: s["blocks"][2].update(shares=None), "2 missing: layer1"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_an_inconsistent_file_is_refused_in_one_line(kind: str, tiny: OdeResNet, tmp_path: Path):
    rewrite, change, message = BROKEN[kind]
    path = tmp_path / "net.safetensors"
    tiny.replace_stage("layer1", REWRITES[rewrite](tiny.stages["layer1"]))
    save(tiny, path)
    edit(path, change)
    with pytest.raises(ResodeError, match=rf"net\.safetensors: .*({message})") as caught:
        load(path)
    assert "\n" not in str(caught.value)
