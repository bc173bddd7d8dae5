"""What a command will take, predicted from a small part of it: seconds and bytes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .model import OdeResNet
from .ode import Adjoint, fixed_buffers, peak_kept_bytes

FEW = 2  # images that are run for a prediction
GRADIENT = 3.0  # forward passes that a forward and a backward pass cost
REPLAYED = 2.0  # evaluations per step of a method that keeps no activations, corrections aside


@dataclass(frozen=True)
class Forecast:
    """bytes: of weights, gradients and activations; images and the process itself come on top."""

    seconds: float
    bytes: int


def forecast_inference(net: nn.Module, image: Tensor, images: int) -> Forecast | None:
    """`images` forward passes, from one image (1, 3, H, W). Bytes: weights, and the largest layer's input and output.

    None for a network that fails, which is for its user to say.
    """
    largest = 0

    def see(module: nn.Module, given: tuple[object, ...], out: object) -> None:
        nonlocal largest
        tensors = [t for t in (*given, out) if isinstance(t, Tensor)]
        largest = max(largest, sum(t.nbytes for t in tensors))

    leaves = [m for m in net.modules() if not any(True for _ in m.children())]
    hooks = [leaf.register_forward_hook(see) for leaf in leaves]
    began = time.perf_counter()
    try:
        with torch.no_grad():
            net(image)
    except Exception:
        return None
    finally:
        for hook in hooks:
            hook.remove()
    seconds = (time.perf_counter() - began) * images
    return Forecast(seconds, _weights(net) + largest * images)


def forecast_gradients(model: OdeResNet, images: Tensor, methods: Sequence[Adjoint]) -> Forecast:
    """Backprop's gradients and each method's on a batch (B, 3, H, W), from backprop on a few of its images.

    Methods that keep no activations evaluate the branches again; calibration is not included. The model is
    left as it was.
    """
    few = images[: min(FEW, len(images))]
    adjoints = {name: stage.adjoint for name, stage in model.stages.items()}
    training = model.training
    try:
        model.eval()
        model.use_adjoint(Adjoint("backprop"))
        with fixed_buffers([model]), torch.enable_grad():
            parameters = [p for p in model.parameters() if p.requires_grad]
            with peak_kept_bytes(model.parameters()) as count:
                _gradients(model, few, parameters)
            began = time.perf_counter()
            _gradients(model, few, parameters)
            seconds = time.perf_counter() - began
    finally:
        model.use_adjoint(adjoints)
        model.train(training)
    scale = len(images) / len(few)
    backward = sum(1 if m.method == "backprop" else 1 + (REPLAYED + m.corrections) / GRADIENT for m in methods)
    return Forecast(seconds * scale * (1 + backward), int(count() * scale) + 3 * _weights(model))


def _gradients(model: OdeResNet, images: Tensor, parameters: list[nn.Parameter]) -> None:
    logits = model(images)
    torch.autograd.grad(F.cross_entropy(logits, logits.argmax(1)), parameters, allow_unused=True)
    if images.is_cuda:
        torch.cuda.synchronize(images.device)


def _weights(net: nn.Module) -> int:
    return sum(p.nbytes for p in net.parameters())
