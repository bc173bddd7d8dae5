"""A simulated step holds what the step itself holds, byte by byte, and costs what its operations cost."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from resode_cli.errors import ResodeError
from resode_cli.network.model import OdeResNet, freeze_batch_norm
from resode_cli.ode import Adjoint
from resode_cli.ode.memory import LiveBytes
from resode_cli.simulation.ledger import CPU, CUDA, Machine
from resode_cli.simulation.step import REST, Simulation, piece_names
from resode_cli.surgery.rewrite import deepen

IMAGES = (8, 3, 16, 16)
PLAIN = replace(CPU, copies=False)  # a library's own copies are no tensors, and seen from outside alone
PLANS = [
    Adjoint(),
    Adjoint("checkpoint"),
    Adjoint("checkpoint", snapshots=2),
    Adjoint("checkpoint", bits=4),
    Adjoint("checkpoint", slices=4),
    Adjoint("multistep"),
    Adjoint("pc", 3),
]


@pytest.fixture
def model(build_tiny) -> OdeResNet:
    made: OdeResNet = build_tiny()
    for name, stage in made.stages.items():
        made.replace_stage(name, deepen(stage, 5))
    made.train()
    freeze_batch_norm(made)
    return made


def simulated(model: OdeResNet, machine: Machine = PLAIN) -> Simulation:
    simulation = Simulation(model, "cpu")
    simulation.machine = machine
    return simulation


def really(model: OdeResNet, adjoint: Adjoint, amp: bool = False) -> int:
    """The most bytes alive in a step, beside weights and images, as its operations make them."""
    model.use_adjoint(adjoint)
    x, y = torch.randn(IMAGES), torch.zeros(IMAGES[0], dtype=torch.long)
    peak = 0
    for _ in range(2):  # the first run finds out what can be evaluated again
        for p in model.parameters():
            p.grad = None
        with LiveBytes([*model.parameters(), *model.buffers(), x, y]) as live:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
                logits = model(x)
            loss = F.cross_entropy(logits.float(), y)
            torch.autograd.backward(loss)
            peak = live.peak
            del logits, loss
    return peak


@pytest.mark.parametrize("adjoint", PLANS, ids=lambda adjoint: adjoint.label)
def test_a_simulated_step_holds_what_the_step_holds(adjoint, model):
    simulation = simulated(model)
    found = [simulation.step(adjoint, IMAGES) for _ in range(2)][-1]
    assert found.peak - found.fixed == pytest.approx(really(model, adjoint), rel=0.03)


@pytest.mark.parametrize("adjoint", [Adjoint(), Adjoint("checkpoint"), Adjoint("checkpoint", bits=4)])
def test_and_under_autocast(adjoint, model):
    simulation = simulated(model)
    found = [simulation.step(adjoint, IMAGES, amp="bf16") for _ in range(2)][-1]
    assert found.peak - found.fixed == pytest.approx(really(model, adjoint, amp=True), rel=0.03)


def test_batch_statistics_too(model):
    model.train()
    found = simulated(model).step(Adjoint("checkpoint"), IMAGES)
    assert found.peak - found.fixed == pytest.approx(really(model, Adjoint("checkpoint")), rel=0.03)


def test_the_pieces_make_up_the_step(model):
    """The peak follows from what pieces keep, let go and work with, and the time is the sum of theirs."""
    simulation = simulated(model)
    for adjoint in (Adjoint(), Adjoint("checkpoint"), Adjoint("multistep")):
        found = [simulation.step(adjoint, IMAGES) for _ in range(2)][-1]
        assert list(found.pieces) == piece_names(model) and list(found.pieces)[-1] == REST
        alive = peak = 0
        for use in found.pieces.values():
            peak = max(peak, alive + use.forward)
            alive += use.kept
        for use in reversed(found.pieces.values()):
            peak = max(peak, alive + use.backward)
            alive += use.left
        assert found.peak - found.fixed == peak
        assert found.seconds == pytest.approx(sum(use.seconds for use in found.pieces.values()), rel=1e-3)


def test_micro_batches_hold_their_share_and_all_gradients(model):
    simulation = simulated(model)
    whole, quarter = (simulation.step(Adjoint(), IMAGES, micro_batches=n) for n in (1, 4))
    gradients = sum(p.nbytes for p in model.parameters())
    activations = whole.peak - whole.fixed
    assert activations / 4 - gradients < quarter.peak - quarter.fixed < activations / 4 + 2 * gradients


def test_time_is_by_the_roofline(model):
    """Without arithmetic or traffic to speak of, time is the number of operations, however large; and so on."""
    by_start = Machine(arithmetic=1e30, traffic=1e30, start=1.0)
    by_traffic = Machine(arithmetic=1e30, traffic=1.0, start=0.0)
    by_arithmetic = Machine(arithmetic=1.0, traffic=1e30, start=0.0)
    small, large = (4, 3, 16, 16), (8, 3, 16, 16)
    for machine, ratio in ((by_start, 1.0), (by_traffic, 2.0), (by_arithmetic, 2.0)):
        times = [simulated(model, machine).step(Adjoint(), shape).seconds for shape in (small, large)]
        assert times[1] / times[0] == pytest.approx(ratio, rel=0.1)
    # Three passes' arithmetic, and a fourth where everything is evaluated again.
    again = simulated(model, by_arithmetic).step(Adjoint("checkpoint"), large).seconds
    assert again / times[1] == pytest.approx(4 / 3, rel=0.05)


def test_a_simulation_leaves_the_network_and_the_generators_as_they_were(model):
    state, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    adjoints = model.adjoints
    Simulation(model, "cuda").step(Adjoint("multistep"), IMAGES, amp="bf16")
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random) and model.adjoints == adjoints
    assert all(p.grad is None for p in model.parameters())


def test_a_gpu_need_not_be_there(model):
    """A layer norm is float32 under a GPU's autocast; and nothing is copied there for a convolution."""
    on_cpu, on_cuda = (Simulation(model, device) for device in ("cpu", "cuda"))
    assert on_cuda.machine == CUDA and not CUDA.copies
    assert on_cuda.step(Adjoint(), IMAGES).peak <= on_cpu.step(Adjoint(), IMAGES).peak
    assert on_cuda.step(Adjoint(), IMAGES, amp="bf16").peak < on_cuda.step(Adjoint(), IMAGES).peak


@pytest.mark.parametrize("adjoint", [Adjoint("checkpoint"), Adjoint("pc", 2)])
def test_a_simulation_leaves_nothing_behind_that_real_steps_would_take(adjoint, model):
    """Whatever is remembered by shape: a step that does not repeat is still seen after a simulation of its shapes."""
    simulated(model).step(adjoint, IMAGES)

    class Counts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = [0]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls[0] += 1
            return x * (1 + 0.1 * self.calls[0])

    block = model.stages["layer2"].blocks[0]
    block.bn2 = torch.nn.Sequential(block.bn2, Counts())
    model.use_adjoint(adjoint)
    with pytest.raises(ResodeError, match="gives another result than in the forward pass"):
        torch.autograd.backward(model(torch.randn(IMAGES)).square().sum())
