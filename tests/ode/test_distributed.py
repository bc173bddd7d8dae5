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

from resode_cli.network.reading import read_split
from resode_cli.network.specs import BlockSpec, StageSpec
from resode_cli.network.stage import OdeStage
from resode_cli.ode import Adjoint
from resode_cli.sources.cifar import CifarBlock

ADJOINTS = {
    "checkpoint": Adjoint("checkpoint"),
    "snapshots": Adjoint("checkpoint", snapshots=2),
    "pc": Adjoint("pc"),
    "multistep": Adjoint("multistep"),
}
WORLD = 2


class Net(nn.Module):
    """A stem, a tied stage with frozen BatchNorm, a head."""

    def __init__(self, method: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        block = CifarBlock(4, 4, stride=1, shortcut="A")
        spec = StageSpec("layer1", "layer1", (), ("0",), (BlockSpec("0", "0"),), (0,) * 6, Fraction(1))
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.stage = OdeStage(spec, transition={}, blocks=[block], splits=[read_split(block)])
        self.stage.use_adjoint(ADJOINTS[method])
        self.head = nn.Linear(4, 2)
        self.double().eval()  # frozen: batch statistics of half a batch are others

    def forward(self, x):
        return self.head(self.stage(self.stem(x)).mean((2, 3)))


def batch():
    return torch.randn(2 * WORLD, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradients(net, x):
    """After two backward passes: the second one finds the reducer as the first one left it."""
    for _ in range(2):
        net.zero_grad()
        net(x).square().mean().backward()
    return {name.removeprefix("module."): p.grad for name, p in net.named_parameters()}


def train(rank: int, folder: str) -> None:
    for method in ADJOINTS:
        net = DistributedDataParallel(Net(method))
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
    expected = gradients(Net(method), batch())
    for rank in range(WORLD):
        found = torch.load(folder / f"{method}-{rank}.pt", weights_only=True)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
