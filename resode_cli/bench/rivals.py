"""What people do to a network as it is, without converting it, to train it in less memory: measured beside the methods.

Each is a line or two of torch's or timm's own. Where one cannot be had, it says why.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ResodeError
from ..files.exporting import source_state
from ..files.model_file import origin_of
from ..network.mixing import mixes_images
from ..network.model import OdeResNet
from ..sources.registry import build
from .workload import Counted, Method, Trial, Workload, read_method


class NotAvailable(ResodeError):
    """What a library, or this machine, does not offer."""


@dataclass(frozen=True)
class Rival:
    """One of them.

    kind: 'plain', 'grad_checkpointing', 'micro-batches', 'compiled' or 'offload'.
    amount: number of micro-batches, or the memory budget of torch.compile as a share of what backprop keeps.
    """

    kind: str
    amount: float = 0.0

    @property
    def label(self) -> str:
        return {
            "plain": "source, plain",
            "grad_checkpointing": "source, set_grad_checkpointing()",
            "micro-batches": f"source, {self.amount:g} micro-batches",
            "compiled": f"source, torch.compile, budget {self.amount:g}",
            "offload": "source, save_on_cpu()",
        }[self.kind]


RIVALS = (
    Rival("plain"),
    Rival("grad_checkpointing"),
    Rival("micro-batches", 4),
    Rival("compiled", 0.5),
    Rival("compiled", 0.1),
    Rival("offload"),
)


def read_any_method(record: dict[str, Any]) -> Method | Rival:
    """A method, or a rival, from plain values."""
    return Rival(**record) if "kind" in record else read_method(record)


class RivalTrial(Trial):
    """A workload's source network, with the model's weights, trained as a rival trains it.

    Raises ResodeError for a model that its source's blocks do not express, NotAvailable for what cannot be had.
    """

    def __init__(self, workload: Workload, rival: Rival) -> None:
        super().__init__(workload, None)
        model = self.module
        assert isinstance(model, OdeResNet)
        origin = origin_of(model.info.source, workload.source, trust_source=workload.trust_source)
        self.rival, self.net, self.stages = rival, build(origin), {}
        self.net.load_state_dict(source_state(model))
        self._set_up(self.net)
        named = dict(self.net.named_parameters())
        self.parameters = [named[model.file_name(name)] for name, _ in model.net.named_parameters()]
        self.module = self._prepared()

    def _prepared(self) -> nn.Module:
        rival, net = self.rival, self.net
        if rival.kind == "grad_checkpointing":
            try:
                net.set_grad_checkpointing()  # type: ignore[operator]
            except (AttributeError, AssertionError, NotImplementedError):
                raise NotAvailable("its library has none for this network") from None
        elif rival.kind == "micro-batches" and mixes_images(net, net, self.inputs):
            raise NotAvailable("it mixes the images of a batch, so that parts of it have another gradient")
        elif rival.kind == "compiled":
            return torch.compile(net)  # type: ignore[return-value]
        elif rival.kind == "offload" and self.device.type != "cuda":
            raise NotAvailable("it moves activations off a GPU, and this is none")
        return net

    def use(self, method: object) -> None:
        """It is used already."""

    def load_batch(self, images: int) -> None:
        module, self.module = self.module, self.model
        super().load_batch(images)
        self.module = module

    def buffers(self) -> list[Tensor]:
        named = dict(self.net.named_buffers())
        return [named[name].clone() for name in sorted(named)]

    def counted_step(self) -> Counted:
        self.clear()
        self.reset()
        self.step()
        gradients = [p.grad for p in self.parameters]
        self.clear()
        return Counted(gradients, self.buffers(), torch.get_rng_state(), None, None)

    def step(self) -> None:
        """One forward and backward pass, in micro-batches if it is in such."""
        whole, labels = self.inputs, self.labels
        parts = int(self.rival.amount) if self.rival.kind == "micro-batches" else 1
        try:
            with self._conditions():
                for self.inputs, self.labels in zip(whole.chunk(parts), labels.chunk(parts), strict=True):
                    torch.autograd.backward(self.loss() * (len(self.labels) / len(labels)))
        finally:
            self.inputs, self.labels = whole, labels
        self.wait()

    @contextmanager
    def _conditions(self) -> Iterator[None]:
        """What is to hold while it is compiled and while it runs."""
        if self.rival.kind == "compiled":
            from torch._functorch import config

            with config.patch(activation_memory_budget=self.rival.amount):
                yield
        elif self.rival.kind == "offload":
            with torch.autograd.graph.save_on_cpu(pin_memory=True):
                yield
        else:
            yield
