"""Re-estimated BatchNorm statistics are cumulative averages; everything else stays."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from resode_cli.data import Batch
from resode_cli.errors import ResodeError
from resode_cli.network.assembling import assemble
from resode_cli.network.model import OdeResNet
from resode_cli.network.parts import StageParts
from resode_cli.surgery.batch_norm import recalibrate
from resode_cli.surgery.convert import stage_specs
from resode_cli.surgery.rewrite import tie


def random_batches(*sizes: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(4)
    images = [(i + 1.0) * torch.randn(size, 3, 16, 16, generator=generator) + i for i, size in enumerate(sizes)]
    return [Batch(x, torch.zeros(len(x), dtype=torch.long)) for x in images]


def assert_averages(norm: nn.BatchNorm2d, inputs: list[Tensor]) -> None:
    """The mean over calls of each call's mean, and of its unbiased variance."""
    mean = torch.stack([x.mean(dim=(0, 2, 3)) for x in inputs]).mean(0)
    variance = torch.stack([x.transpose(0, 1).flatten(1).var(dim=1, unbiased=True) for x in inputs]).mean(0)
    torch.testing.assert_close(norm.running_mean, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_var, variance, rtol=1e-4, atol=1e-5)


def test_the_first_norm_averages_over_the_batches(tiny: OdeResNet):
    batches = random_batches(4, 6, 3)
    assert recalibrate(tiny, batches) == 13
    with torch.no_grad():
        assert_averages(tiny.net.bn1, [tiny.net.conv1(batch.images) for batch in batches])
    assert tiny.net.bn1.num_batches_tracked == 3


def test_a_block_that_serves_several_steps_averages_over_all_of_them(tiny: OdeResNet):
    tiny.replace_stage("layer1", tie(tiny.stages["layer1"]))
    norm = tiny.stages["layer1"].blocks[0].bn1
    inputs: list[Tensor] = []
    norm.register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone()))
    recalibrate(tiny, random_batches(4, 4))
    assert len(inputs) == 2 * 3
    assert_averages(norm, inputs)


def test_the_old_statistics_do_not_matter(tiny: OdeResNet):
    other = copy.deepcopy(tiny)
    for module in other.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean += 5
    for model in (tiny, other):
        recalibrate(model, random_batches(4, 4))
    buffers = dict(other.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in tiny.named_buffers())


def test_parameters_stay(tiny: OdeResNet):
    before = [p.clone() for p in tiny.parameters()]
    recalibrate(tiny, random_batches(4))
    assert all(torch.equal(a, b) for a, b in zip(before, tiny.parameters(), strict=True))


@pytest.mark.parametrize("training", [False, True])
def test_momentum_and_every_training_flag_are_put_back(training: bool, tiny: OdeResNet):
    tiny.train(training)
    tiny.net.bn1.train(not training)
    tiny.net.bn1.momentum = 0.3
    before = [module.training for module in tiny.modules()]
    recalibrate(tiny, random_batches(4))
    assert [module.training for module in tiny.modules()] == before
    assert tiny.net.bn1.momentum == 0.3 and tiny.stages["layer1"].blocks[0].bn1.momentum == 0.1


def test_momentum_and_flags_are_put_back_after_a_failure(tiny: OdeResNet):
    def broken():
        yield from random_batches(4)
        raise RuntimeError("the disk went away")

    before = [module.training for module in tiny.modules()]
    with pytest.raises(RuntimeError):
        recalibrate(tiny, broken())
    assert [module.training for module in tiny.modules()] == before
    assert tiny.net.bn1.momentum == 0.1


def test_a_batch_of_one_image_is_left_out(tiny: OdeResNet):
    # A variance over one image's 1×1 map would be none.
    assert recalibrate(tiny, random_batches(4, 1)) == 4
    assert tiny.net.bn1.num_batches_tracked == 1


@pytest.mark.parametrize(
    ("sizes", "message"), [((), "no image could be read"), ((1, 1), "need a batch size of 2 or more")]
)
def test_no_image_is_an_error(sizes: tuple[int, ...], message: str, tiny: OdeResNet):
    with pytest.raises(ResodeError, match=message):
        recalibrate(tiny, random_batches(*sizes))


STATELESS = {
    "no norm": nn.Identity(),
    "GroupNorm": nn.GroupNorm(1, 3),
    "BatchNorm of the batch": nn.BatchNorm2d(3, track_running_stats=False),
}


@pytest.mark.parametrize("norm", STATELESS)
def test_a_model_without_statistics_is_refused(norm: str, info):
    class Step(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x)

    net = nn.Sequential(nn.Sequential(Step(nn.Conv2d(3, 3, 1), STATELESS[norm])))
    model = assemble(net, stage_specs([StageParts("0", (), ("0",))], scheme="euler", form="exact"), info)
    with pytest.raises(ResodeError, match="no BatchNorm statistics"):
        recalibrate(model, random_batches(4))
