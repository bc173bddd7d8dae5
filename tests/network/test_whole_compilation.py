"""torch.compile of a whole converted network: the results, gradients and buffers of the network as it is."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from resode_cli.network.model import OdeResNet
from resode_cli.ode import Adjoint

# dynamo reads the .grad of tensors that are no leaves, and hides the warning in a way that errors get past.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
METHODS = [Adjoint("backprop"), Adjoint("checkpoint"), Adjoint("multistep"), Adjoint("pc", 2)]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def one_pass(net: torch.nn.Module, model: OdeResNet, images: Tensor) -> dict[str, Tensor]:
    """Logits, gradients and buffers after a training pass, and logits without a tape."""
    model.zero_grad()
    logits = net(images)
    logits.square().sum().backward()
    with torch.no_grad():
        after = net(images)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    return {"logits": logits.detach(), "without a tape": after, **gradients, **buffers}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("branches", [False, True], ids=["stages as they are", "steps compiled too"])
def test_a_compiled_network_is_the_network(training, branches, tiny, images):
    """All methods in one test, since they share the compiled graphs."""
    tiny, images = tiny.double().train(training), images.double()
    compiled_model = copy.deepcopy(tiny)
    if branches:
        compiled_model.compile_branches(backend="aot_eager")
    compiled = torch.compile(compiled_model, backend="aot_eager")
    for adjoint in METHODS:
        tiny.use_adjoint(adjoint)
        compiled_model.use_adjoint(adjoint)
        expected = one_pass(tiny, tiny, images)
        found = one_pass(compiled, compiled_model, images)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11, msg=f"{adjoint.label}: {name}")
        evaluations = [stage.monitor.evaluations for stage in tiny.stages.values()]
        assert [stage.monitor.evaluations for stage in compiled_model.stages.values()] == evaluations


def test_what_is_outside_the_stages_is_compiled(tiny, images):
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    torch.compile(tiny, backend=keep)(images)
    layers = [str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    assert any("conv2d" in name for name in layers) and any("linear" in name for name in layers)


def test_another_size_and_method_run_after_compilation(tiny, images):
    compiled = torch.compile(tiny, backend="eager")
    compiled(images)
    tiny.use_adjoint(Adjoint("checkpoint", snapshots=1))
    smaller = images[:2, :, :12, :]
    torch.testing.assert_close(compiled(smaller), tiny(smaller))
