"""Two processes with DistributedDataParallel and tied weights against one process on the joint batch."""

from __future__ import annotations

import gc
import os
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from resode_cli.network.assembling import assemble
from resode_cli.network.model import ModelInfo, OdeResNet
from resode_cli.network.parts import Preprocessing, SourceSpec
from resode_cli.network.specs import BlockSpec, StageSpec
from resode_cli.ode import Adjoint
from resode_cli.sources.cifar import CifarBlock

ADJOINTS = {
    "checkpoint": Adjoint("checkpoint"),
    "snapshots": Adjoint("checkpoint", snapshots=2),
    "pc": Adjoint("pc"),
    "multistep": Adjoint("multistep"),
    "slices": Adjoint("checkpoint", slices=2),
    "codes": Adjoint("checkpoint", bits=8),
}
WORLD = 2


class Net(nn.Module):
    """A stem, a stage of a transition and a block, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.layer1 = nn.Sequential(CifarBlock(4, 6, stride=1, shortcut="B"), CifarBlock(6, 6, stride=1, shortcut="A"))
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.layer1(self.stem(x)).mean((2, 3)))


def model(method: str) -> OdeResNet:
    """With the block tied over six steps, and frozen BatchNorm: statistics of half a batch are others."""
    torch.manual_seed(0)
    spec = StageSpec("layer1", "layer1", ("0",), ("1",), (BlockSpec("1", "1"),), (0,) * 6, Fraction(1))
    made = assemble(Net(), [spec], ModelInfo(SourceSpec("file", "net.py:make"), Preprocessing(), 2)).double().eval()
    made.use_adjoint(ADJOINTS[method])
    return made


def batch():
    # 64 pixels: no group of numbers that are coded together is of two images.
    return torch.randn(2 * WORLD, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradients(net, x):
    """After two backward passes: the second one finds the reducer as the first one left it."""
    for _ in range(2):
        net.zero_grad()
        net(x).square().mean().backward()
    return {name.removeprefix("module."): p.grad for name, p in net.named_parameters()}


def train(rank: int, folder: str) -> None:
    for method in ADJOINTS:
        net = DistributedDataParallel(model(method))
        torch.save(gradients(net, batch().chunk(WORLD)[rank]), Path(folder) / f"{method}-{rank}.pt")


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    train(rank, folder)
    # Each of these can abort a child on a busy machine: a rank that leaves while the other still waits for it;
    # a DistributedDataParallel in a reference cycle, whose threads outlive the group; and those threads asking for
    # the interpreter while it shuts down. Hence: wait, collect, destroy, and leave without a shutdown.
    dist.barrier()
    gc.collect()
    dist.destroy_process_group()
    os._exit(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("ddp")
    torch.multiprocessing.spawn(worker, args=(str(path),), nprocs=WORLD)  # type: ignore[attr-defined]
    return path


@pytest.mark.parametrize("method", ADJOINTS)
def test_two_processes_agree_with_the_joint_batch(method, folder):
    expected = gradients(model(method), batch())
    for rank in range(WORLD):
        found = torch.load(folder / f"{method}-{rank}.pt", weights_only=True)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
