"""What a command will take, predicted from a small part of it: seconds and bytes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ResodeError
from ..network.model import OdeResNet
from ..ode import Adjoint, fixed_buffers
from ..ode.memory import LiveBytes
from ..simulation.step import Simulation

FEW = 2  # images that are run for a prediction
GRADIENT = 3.0  # forward passes that a forward and a backward pass cost
RUNS = 9  # of the batch, by a conversion: in both modes before and after it, block by block, and for gradients
COMPARED = 2  # images whose gradients are compared, before and after
REPLAYED = 2.0  # evaluations per step of a method that keeps no activations, corrections aside


@dataclass(frozen=True)
class Forecast:
    """bytes: of weights, gradients and activations that are alive at a time; None where they are not known.

    On top come images, Python, torch, and what the C library's allocator keeps of freed memory: with many methods in
    turn a process on the CPU grew by 2.0 to 2.4 times the bytes of `check-grad` where these were more than 200 MiB.
    """

    seconds: float
    bytes: int | None


def forecast_conversion(net: nn.Module, image: Tensor, images: int) -> Forecast | None:
    """What `convert` takes that compares logits of `images` images, from one image (1, C, H, W).

    Seconds: RUNS passes of the batch. Bytes: the weights, and the largest of what one pass of the batch has alive, what
    modules take and return for one image, among which the search for stages looks, and gradients, before and after.
    None for a network that fails, which is for its user to say.
    """
    passed: dict[int, Tensor] = {}

    def see(_: nn.Module, given: tuple[object, ...], out: object) -> None:
        for tensor in (*given, out):
            if isinstance(tensor, Tensor):
                passed[tensor.untyped_storage()._cdata] = tensor

    own = [*net.parameters(), *net.buffers(), image]
    hooks = [module.register_forward_hook(see) for module in net.modules()]
    try:
        with torch.no_grad():
            net(image)
            kept = sum(tensor.untyped_storage().nbytes() for tensor in passed.values())
            for hook in hooks:
                hook.remove()
            passed.clear()
            began = time.perf_counter()
            with LiveBytes(own) as live:
                net(image)
            seconds = (time.perf_counter() - began) * images * RUNS
    except Exception:
        return None
    finally:
        for hook in hooks:
            hook.remove()
    weights = _weights(net)
    return Forecast(seconds, weights + max(live.peak * images, kept + live.peak, 3 * weights + COMPARED * kept))


def forecast_gradients(model: OdeResNet, images: Tensor, methods: Sequence[Adjoint]) -> Forecast:
    """Backprop's gradients and each method's on a batch (B, 3, H, W).

    Seconds: from backprop on a few of its images; methods that keep no activations evaluate the branches again. Bytes:
    of a simulated step; None for a network that cannot be simulated. The choice of adjoints is not included. The model
    is left as it was.
    """
    few = images[: min(FEW, len(images))].clone()  # a view would keep the storage of all
    adjoints = model.adjoints
    training = model.training
    try:
        model.eval()
        model.use_adjoint(Adjoint("backprop"))
        with fixed_buffers([model]), torch.enable_grad():
            parameters = [p for p in model.parameters() if p.requires_grad]
            _gradients(model, few, parameters)
            began = time.perf_counter()
            _gradients(model, few, parameters)
            seconds = time.perf_counter() - began
        peak = _simulated(model, tuple(images.shape), images.device.type)
    finally:
        model.use_adjoint(adjoints)
        model.train(training)
    scale = len(images) / len(few)
    backward = sum(1 + (REPLAYED + m.corrections) / GRADIENT if m.replays else 1 for m in methods)
    return Forecast(seconds * scale * (1 + backward), peak)


def _simulated(model: OdeResNet, shape: tuple[int, ...], device: str) -> int | None:
    """Bytes of a step by backprop, which others exceed by a few states at most, and of the gradients compared."""
    try:
        return Simulation(model, device).step(Adjoint("backprop"), shape, optimizer_slots=0).peak + _weights(model)
    except ResodeError:  # it may decide by its numbers; a prediction stops nothing
        return None


def _gradients(model: OdeResNet, images: Tensor, parameters: list[nn.Parameter]) -> None:
    logits = model(images)
    torch.autograd.grad(F.cross_entropy(logits, logits.argmax(1)), parameters, allow_unused=True)
    if images.is_cuda:
        torch.cuda.synchronize(images.device)


def _weights(net: nn.Module) -> int:
    return sum(p.nbytes for p in net.parameters())
