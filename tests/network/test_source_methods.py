"""What a source network could do besides logits goes on working, or is refused with a reason."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import timm
import torch
import torchvision
from timm.optim import create_optimizer_v2
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from resode_cli.errors import ResodeError
from resode_cli.network.model import OdeResNet
from resode_cli.network.stage import OdeStage
from resode_cli.surgery.convert import convert

SIZE = 64
NAMES = ("resnet18", "resnetv2_18", "regnety_002", "gernet_s", "nf_regnet_b0", "convnext_atto", "hrnet_w18_small")


def images() -> torch.Tensor:
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


@cache
def pair(name: str, **arguments: object) -> tuple[nn.Module, OdeResNet]:
    """A network and the same converted, for tests that change neither."""
    net = timm.create_model(name, num_classes=5, **arguments)
    size = int(arguments.get("img_size", SIZE))  # type: ignore[call-overload]
    return copy.deepcopy(net).eval(), convert(net, example=images()[..., :size, :size])[0]


@pytest.fixture(scope="module", autouse=True)
def let_go():
    """They take much memory together."""
    yield
    pair.cache_clear()


@pytest.mark.parametrize("name", [*NAMES, "legacy_xception"])
def test_intermediate_features_are_the_sources(name: str):
    source, model = pair(name)
    with torch.no_grad():
        last, features = source.forward_intermediates(images())
        own_last, own_features = model.net.forward_intermediates(images())
    assert len(features) == len(own_features) > 3
    assert all(torch.equal(a, b) for a, b in zip([last, *features], [own_last, *own_features], strict=True))


@pytest.mark.parametrize("name", [*NAMES, "vit_tiny_patch16_224"])
def test_layer_decay_gives_every_parameter_the_same_rate(name: str):
    source, model = pair(name, **({"img_size": SIZE} if name.startswith("vit") else {}))
    rates = []
    for net, rename in ((source, str), (model.net, model.file_name)):
        names = {id(p): rename(key) for key, p in net.named_parameters()}
        optimizer = create_optimizer_v2(net, opt="sgd", lr=0.1, weight_decay=0.01, layer_decay=0.7)
        groups = [(p, group) for group in optimizer.param_groups for p in group["params"]]
        rates.append({names[id(p)]: (group["lr"], group["lr_scale"], group["weight_decay"]) for p, group in groups})
    assert rates[0] == rates[1] and len(set(rates[0].values())) > 5


def test_layer_decay_is_refused_where_names_no_longer_tell_layers_apart():
    _, model = pair("legacy_xception")
    with pytest.raises(ResodeError, match="layer decay goes by them"):
        create_optimizer_v2(model.net, opt="sgd", lr=0.1, layer_decay=0.7)


@pytest.mark.parametrize("name", ["resnet18", "resnetv2_18", "gernet_s", "vit_tiny_patch16_224"])
def test_the_sources_gradient_checkpointing_has_the_same_gradients(name: str):
    source, model = copy.deepcopy(pair(name, **({"img_size": SIZE} if name.startswith("vit") else {})))
    for net in (source, model.net):
        net.train().set_grad_checkpointing(True)
    for net in (source, model):
        net(images()).square().sum().backward()
    own = {model.file_name(key): p.grad for key, p in model.net.named_parameters()}
    for key, parameter in source.named_parameters():
        torch.testing.assert_close(own[key], parameter.grad, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_inside_a_stage_is_refused_not_ignored():
    _, model = copy.deepcopy(pair("regnety_002"))
    model.net.set_grad_checkpointing(False)
    with pytest.raises(ResodeError, match=r"stage s1 checkpoints by its adjoint: use_adjoint\(Adjoint\('checkpoint'\)"):
        model.net.set_grad_checkpointing(True)


def test_features_from_inside_a_stage_are_refused():
    _, model = pair("vit_tiny_patch16_224", img_size=SIZE)
    with pytest.raises(ResodeError, match="stage blocks has no length: its steps run as one"):
        model.net.forward_intermediates(images(), indices=[3])
    with pytest.raises(ResodeError, match="cannot be indexed"):
        model.net.blocks[0]
    first, *others = model.net.blocks
    assert model.net.blocks and len(others) == 11
    state = torch.randn(1, 17, 192)
    assert torch.equal(first(state), model.stages["blocks"](state)) and all(block(state) is state for block in others)


def test_features_from_between_emptied_blocks_are_refused_and_not_those_of_the_last():
    _, model = pair("eva02_tiny_patch14_224", img_size=56)
    with pytest.raises(ResodeError, match="stage blocks hands out no intermediate features"):
        model.net.forward_intermediates(images()[..., :56, :56])
    with torch.no_grad():
        assert copy.deepcopy(model.net)(images()[..., :56, :56]).shape == (2, 5)


def test_a_network_of_features_is_refused_with_a_way_out():
    with pytest.raises(ResodeError, match=r"list where logits .* are needed; convert it with its head"):
        convert(timm.create_model("resnet18", features_only=True), example=images())


def test_torchvisions_extractor_takes_stages_as_leaves():
    net = torchvision.models.resnet18(num_classes=5).eval()
    source = create_feature_extractor(copy.deepcopy(net), ["layer2"]).eval()
    model, _ = convert(net, example=images())
    with pytest.raises(ResodeError, match="name it among the tracer's leaf modules"):
        create_feature_extractor(model.net, ["layer2"])
    extractor = create_feature_extractor(model.net, ["layer2"], tracer_kwargs={"leaf_modules": [OdeStage]})
    with torch.no_grad():
        assert torch.equal(extractor.eval()(images())["layer2"], source(images())["layer2"])
