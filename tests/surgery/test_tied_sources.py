"""Networks that run one block several times, as people write them: they are tied stages."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import resode_cli
from resode_cli import Adjoint, OdeResNet, ResodeError
from resode_cli.files.exporting import source_state


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor, t: float = 1.0) -> Tensor:
        return x + t * self.conv(F.relu(self.bn(x)))


def _times(net: Any, x: Tensor) -> Tensor:
    for _ in range(net.n):
        x = net.layer(x)
    return x


def _each(net: Any, x: Tensor) -> Tensor:
    for block in net.layer:
        x = block(x)
    return x


def _at_times(net: Any, x: Tensor) -> Tensor:
    for i, block in enumerate(net.layer):
        x = block(x, (i + 1) / net.n)
    return x


def _one_at_times(net: Any, x: Tensor) -> Tensor:
    for i in range(net.n):
        x = net.layer(x, (i + 1) / net.n)
    return x


def _read_between(net: Any, x: Tensor) -> Tensor:
    total = 0
    for _ in range(net.n):
        x = net.layer(x)
        total = total + x
    return total


def _call(net: Any, x: Tensor) -> Tensor:
    return net.layer(x)


class Net(nn.Module):
    def __init__(self, layer: nn.Module, body: Any) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.layer, self.body, self.n = layer, body, 4
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self, self.stem(x)).mean((2, 3)))


TIED = {
    "a sequence of one block": lambda: Net(nn.Sequential(*[Block()] * 4), _call),
    "a list of one block": lambda: Net(nn.ModuleList([Block()] * 4), _each),
    "a loop over one block": lambda: Net(Block(), _times),
    "a loop over a sequence": lambda: Net(nn.Sequential(Block()), _times),
}
LOOPS = [name for name in TIED if name.startswith("a loop")]


def _images(size: int = 6) -> Tensor:
    return torch.randn(6, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _pair(make: Any) -> tuple[Any, OdeResNet]:
    torch.manual_seed(1)
    net = make().double().eval()
    return net, resode_cli.convert(copy.deepcopy(net), example=_images())[0]


@pytest.mark.parametrize("name", TIED)
def test_one_block_run_four_times_is_a_tied_stage(name: str) -> None:
    net, model = _pair(TIED[name])
    (stage,) = model.stages.values()
    assert (stage.spec.kind, stage.spec.depth, stage.spec.horizon, len(stage.blocks)) == ("tied", 4, 4, 1)
    assert torch.equal(model(_images()), net(_images()))
    assert {model.file_name(key) for key, _ in model.net.named_parameters()} == dict(net.named_parameters()).keys()


@pytest.mark.parametrize("method", ["backprop", "checkpoint"])
@pytest.mark.parametrize("name", TIED)
def test_its_gradients_and_statistics_are_the_sources(name: str, method: str) -> None:
    net, model = _pair(TIED[name])
    model.use_adjoint(Adjoint(method))
    for each in (net, model):
        each.train()(_images()).square().sum().backward()
    gradients = {model.file_name(key): p.grad for key, p in model.net.named_parameters()}
    for key, parameter in net.named_parameters():
        torch.testing.assert_close(gradients[key], parameter.grad, rtol=1e-10, atol=1e-12)
    buffers = {model.file_name(key): b for key, b in model.net.named_buffers()}
    for key, buffer in net.named_buffers():
        torch.testing.assert_close(buffers[key], buffer, rtol=1e-12, atol=1e-12)


def test_blocks_that_alternate_are_one_stage_of_two_blocks() -> None:
    net, model = _pair(lambda: Net(nn.Sequential(*[Block(), Block()] * 2), _call))
    (stage,) = model.stages.values()
    assert stage.spec.schedule == (0, 1, 0, 1) and len(stage.blocks) == 2
    assert torch.equal(model(_images()), net(_images()))
    state = model.net.stem(_images())
    torch.testing.assert_close(resode_cli.deepen(stage, 4, depth_weights="linear")(state), stage(state))


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_that_comes_to_run_another_number_of_times(name: str) -> None:
    net, model = _pair(TIED[name])
    net.n = model.net.n = 8  # twice the four steps
    assert torch.equal(model(_images()), net(_images()))
    for n in (1, 3, 6):
        model.net.n = n
        with pytest.raises(ResodeError, match="does not run its blocks one after the other"):
            model(_images())
    model.net.n = 4
    model(_images())


@pytest.mark.filterwarnings("ignore:.*jit.trace:FutureWarning")
@pytest.mark.parametrize("name", LOOPS)
def test_where_a_loop_cannot_be_followed_it_is_an_error_and_no_other_function(name: str) -> None:
    _, model = _pair(TIED[name])
    with pytest.raises(ResodeError, match=r"call the model in place of `model\.net`"):
        model.net(_images())
    with pytest.raises(ResodeError, match="stands for a loop over one block"):
        torch.jit.trace(model, _images())  # type: ignore[no-untyped-call]
    assert model.stages[next(iter(model.stages))](model.net.stem(_images())).shape == (6, 4, 6, 6)


@pytest.mark.parametrize("part", ["model", "net"])
def test_a_loop_cannot_be_compiled_as_a_whole(part: str) -> None:
    _, model = _pair(TIED["a loop over one block"])
    compiled = torch.compile(model if part == "model" else model.net, backend="eager")
    with pytest.raises(ResodeError, match="stands for a loop over one block"):
        compiled(_images())


@pytest.mark.parametrize("name", TIED)
def test_it_can_be_untied_deepened_and_given_back(name: str) -> None:
    net, model = _pair(TIED[name])
    again = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    again.load_state_dict(source_state(model))
    assert torch.equal(again(_images()), net(_images()))
    untied = resode_cli.untie(model)
    (stage,) = untied.stages.values()
    assert stage.spec.kind == "untied" and len({id(b.conv.weight) for b in stage.blocks}) == 4
    assert torch.equal(untied(_images()), net(_images()))
    deep = resode_cli.deepen(model, 12)
    (stage,) = deep.stages.values()
    assert (stage.spec.depth, stage.spec.kind) == (12, "tied")
    block, state = next(m for m in net.modules() if isinstance(m, Block)), net.stem(_images())
    for _ in range(12):
        state = block(state, 4 / 12)
    torch.testing.assert_close(deep(_images()), net.head(state.mean((2, 3))))


class Held(nn.Module):
    """Another module that holds a block, and may run it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.block(x)


def _and_in_head() -> Net:
    block = Block()
    net = Net(nn.Sequential(block, block, block), lambda net, x: net.further(net.layer(x)))
    net.further = Held(block)
    return net


def _and_elsewhere() -> Net:
    block = Block()
    net = Net(nn.Sequential(*[block] * 4), _call)
    net.extra = block
    return net


def _two_containers() -> Net:
    block = Block()
    net = Net(nn.Sequential(block, block), lambda net, x: net.further(F.relu(net.layer(x))))
    net.further = nn.Sequential(block, block)
    return net


def _names_of_one_in_a_loop() -> Net:
    return Net(nn.Sequential(*[Block()] * 2), _times)


REFUSED = {
    r"layer\.0 \(Block\), like 2 more, is held in several places \(layer\.0, further\.block\)": _and_in_head,
    r".*\(Block\), like 3 more, is held in several places": _and_elsewhere,
    r".*\(Block\), like 2 more, is held in several places": _two_containers,
    r"layer\.0 \(Block\), like 1 more, is called 4 times, and under each of its names in turn": _names_of_one_in_a_loop,
    r"layer \(Block\) is called 4 times, with another t each time": lambda: Net(Block(), _one_at_times),
    r"layer \(Block\) is called 4 times, and Net reads states in between": lambda: Net(Block(), _read_between),
    r"layer\.0 \(Block\), like 1 more, is called 4 times, and not each time on its own last result": lambda: Net(
        nn.Sequential(Block(), Block()), _times
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_no_tied_stage_is_refused_with_the_reason(reason: str) -> None:
    net = REFUSED[reason]().double().eval()
    with pytest.raises(ResodeError, match=f"has no residual steps to convert: {reason}"):
        resode_cli.convert(net, example=_images())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_loop_that_checkpoints_by_reentry_is_refused_before_anything_trains_on_it() -> None:
    def body(net: Any, x: Tensor) -> Tensor:
        for _ in range(net.n):
            x = checkpoint(net.layer, x, use_reentrant=True)
        return x

    with pytest.raises(ResodeError, match="use_reentrant=False"):
        resode_cli.convert(Net(Block(), body).double().eval(), example=_images())


def test_results_of_one_loop_may_go_into_another_of_the_same_name() -> None:
    _, model = _pair(TIED["a loop over one block"])
    (stage,), (other,) = model.stages.values(), copy.deepcopy(model).stages.values()
    state = stage(model.net.stem(_images()))
    torch.testing.assert_close(other(state), stage(state.clone()))
    with pytest.raises(ResodeError, match="stage net stands for all calls"):
        stage(state)


def test_what_a_network_keeps_of_a_pass_has_no_history_after_a_conversion() -> None:
    def body(net: Any, x: Tensor) -> Tensor:
        net.kept = net.layer(x)
        return net.kept

    model = resode_cli.convert(Net(nn.Sequential(*[Block()] * 4), body).double(), example=_images())[0]
    assert resode_cli.deepen(model, 8).stages["layer"].spec.depth == 8


def test_stages_come_in_the_order_in_which_their_steps_run() -> None:
    transition = nn.Conv2d(4, 4, 1)
    net = Net(nn.Sequential(transition, Block(), Block()), lambda net, x: net.further(F.relu(net.layer(x))))
    net.further = nn.Sequential(transition, Block(), Block())
    model = resode_cli.convert(net.double().eval(), example=_images())[0]
    assert [stage.spec.container for stage in model.stages.values()] == ["layer", "further"]


def test_two_tensors_of_one_name_are_not_saved_as_one() -> None:
    _, model = _pair(TIED["a list of one block"])
    model.net.layer.register_module("0", nn.ModuleList([model.stages["layer"]]))
    model.paths = {"layer": "layer.0.0"}
    model.net.layer.register_module("bn", nn.BatchNorm2d(4))
    model.stages["layer"].add_module("bn", nn.BatchNorm2d(4))
    with pytest.raises(ResodeError, match=r"two tensors of one name, and cannot be saved: layer\.bn"):
        model.file_state()


def test_a_search_leaves_the_network_as_it_was() -> None:
    layer = nn.Sequential(Block(), *[nn.Conv2d(4, 4, 1)] * 2)
    calls = []
    layer[1].register_forward_hook(lambda *_: calls.append(1))
    net = Net(layer, _read_between).double().eval()
    with pytest.raises(ResodeError):
        resode_cli.convert(net, example=_images())
    assert layer[1] is layer[2]
    calls.clear()
    net(_images())
    assert len(calls) == 8
    assert not any(hooks for m in net.modules() if m is not layer[1] for hooks in (m._forward_hooks,))


def test_a_hook_on_a_block_under_several_names_fires_at_each_step() -> None:
    net, model = _pair(TIED["a sequence of one block"])
    calls: list[int] = []
    (block,) = model.stages["layer"].blocks
    block.register_forward_hook(lambda *_: calls.append(1))
    model(_images())
    assert len(calls) == 4


def test_blocks_that_are_given_another_t_are_named_as_stages_of_one_step() -> None:
    net, model = _pair(lambda: Net(nn.ModuleList([Block() for _ in range(4)]), _at_times))
    assert [stage.spec.depth for stage in model.stages.values()] == [1, 1, 1, 1]
    (told,) = model.info.left_out
    assert told.startswith("the link from layer.0 to layer.1, like 2 more, where blocks are given another t")
    assert torch.equal(model(_images()), net(_images()))


@pytest.mark.parametrize("name", TIED)
def test_a_file_brings_it_back(name: str, tmp_path: Path) -> None:
    layer = {"sequence of": "nn.Sequential(*[Block()] * 4)", "list of": "nn.ModuleList([Block()] * 4)"}
    held = next((code for words, code in layer.items() if words in name), "Block()")
    held = "nn.Sequential(Block())" if "over a sequence" in name else held
    body = "_call" if "sequence of" in name else "_each" if "list of" in name else "_times"
    source = tmp_path / "tied_net.py"
    source.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from torch import nn\nfrom test_tied_sources import Block, Net, _call, _each, _times\n"
        f"def make():\n    return Net({held}, {body})\n"
    )
    from resode_cli.files import model_file
    from resode_cli.network.parts import PreprocessingChoice
    from resode_cli.sources.registry import open_source

    opened = open_source(f"{source}:make", pretrained=False, preprocessing=PreprocessingChoice(size=8))
    model, _ = resode_cli.convert(opened)
    model_file.write(model, tmp_path / "tied.safetensors")
    loaded = resode_cli.load(tmp_path / "tied.safetensors", trust_source=True)
    images = _images(8).float()
    assert torch.equal(loaded.eval()(images), model.eval()(images))
    assert [s.spec for s in loaded.stages.values()] == [s.spec for s in model.stages.values()]


def test_a_file_whose_stage_names_a_block_twice_among_others_is_refused() -> None:
    from resode_cli.files.model_schema import _child, _list, _run, _Wrong

    read = _run(_list(_child, longest=10))
    for good in (["0", "1"], ["0", "0", "0"], []):
        assert read(good, "here") == good
    for bad in itertools.permutations(["0", "0", "1"]):
        with pytest.raises(_Wrong, match="twice"):
            read(list(bad), "here")
