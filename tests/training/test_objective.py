"""What a training run with a teacher minimises, and what it leaves behind."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from resode_cli import data
from resode_cli.app import main
from resode_cli.errors import UsageError
from resode_cli.files import model_file
from resode_cli.network.model import OdeResNet
from resode_cli.training import run_folder
from resode_cli.training.finetune import finetune
from resode_cli.training.objective import Objective
from resode_cli.training.results import Callbacks
from resode_cli.training.settings import Settings
from resode_cli.training.teacher import Teacher, distillation_loss, own_teacher

LABELS = torch.tensor([0, 3, 1, 4])


def softmax(z: Tensor) -> Tensor:
    return z.exp() / z.exp().sum(1, keepdim=True)


def test_distillation_is_the_divergence_of_the_softened_classes():
    z, t = (torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    p, q = softmax(t / 3), softmax(z / 3)
    expected = 9 * (p * (p / q).log()).sum(1).mean()
    # The loss itself works in float32, whatever comes in.
    assert distillation_loss(z, t, 3.0, several=False).item() == pytest.approx(expected.item(), rel=1e-6)
    assert distillation_loss(z, z, 3.0, several=False).item() == pytest.approx(0, abs=1e-7)


def test_of_several_labels_distillation_is_the_mean_divergence_of_each_labels_own_chance():
    generator = torch.Generator().manual_seed(0)
    z, t = torch.randn(2, 6, 4, generator=generator).double().unbind(0)
    p, q = torch.sigmoid(t / 3), torch.sigmoid(z / 3)
    expected = 9 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    assert distillation_loss(z, t, 3.0, several=True).item() == pytest.approx(expected.item(), rel=1e-5)
    # A softmax does not see that all logits move alike, and the labels that are given change by it.
    assert distillation_loss(t + 5, t, 3.0, several=False).item() == pytest.approx(0, abs=1e-6)
    assert distillation_loss(t + 5, t, 3.0, several=True).item() > 0.1


def test_the_gradient_of_distillation_keeps_its_size_at_high_temperatures():
    z = torch.randn(6, 5, requires_grad=True)
    t = torch.randn(6, 5)
    sizes = [
        torch.autograd.grad(distillation_loss(z, t, tau, several=False), z)[0].norm().item() for tau in (50.0, 100.0)
    ]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)
    # Far up, it is that of the logits' squared distance without their means, over twice the classes.
    (found,) = torch.autograd.grad(distillation_loss(z, t, 100.0, several=False), z)
    difference = (z - t).detach()
    expected = (difference - difference.mean(1, keepdim=True)) / 5 / 6
    torch.testing.assert_close(found, expected, rtol=0.05, atol=2e-3)


@pytest.fixture
def pair(build_tiny) -> tuple[OdeResNet, Teacher]:
    """A network, and another one as its teacher."""
    teacher = build_tiny()
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return build_tiny(), own_teacher(teacher, "theirs")


def terms(model: OdeResNet, teacher: Teacher, images: Tensor) -> tuple[float, float, float]:
    """Cross-entropy, distillation at temperature 4, and the mean distance of stage outputs, without the package."""
    outs: list[dict[str, Tensor]] = []
    logits: list[Tensor] = []
    for net in (model, teacher.net):
        found: dict[str, Tensor] = {}
        x = images
        n = net.net
        x = n.bn1(n.conv1(x)).relu()
        for name, stage in net.stages.items():
            x = found[name] = stage(x)
        logits.append(n.linear(x.mean((2, 3))).detach())
        outs.append(found)
    z, t = logits
    p = softmax(z)
    entropy = -p[range(4), LABELS].log().mean().item()
    a, b = softmax(t / 4), softmax(z / 4)
    distance = 16 * (a * (a / b).log()).sum(1).mean().item()
    states = [((outs[0][k] - outs[1][k]).norm() / outs[1][k].norm()).square().item() for k in outs[0]]
    return entropy, distance, sum(states) / len(states)


@pytest.mark.parametrize("distill, states", [(0.0, 0.0), (0.3, 0.0), (1.0, 0.0), (0.3, 2.5)])
def test_the_loss_is_the_weighted_sum(pair, images: Tensor, distill: float, states: float):
    model, teacher = pair
    model.eval()
    settings = Settings(teacher="theirs", distill=distill, temperature=4.0, teacher_states=states)
    loss, logits = Objective(model, teacher, settings)(images, LABELS)
    entropy, distance, apart = terms(model, teacher, images)
    assert min(entropy, distance, apart) > 1e-3
    expected = (1 - distill) * entropy + distill * distance + states * apart
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(logits, model(images))


def test_without_a_teacher_it_is_the_cross_entropy(tiny: OdeResNet, images: Tensor):
    loss, logits = Objective(tiny, None, Settings())(images, LABELS)
    expected = -softmax(logits.detach())[range(4), LABELS].log().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_teacher_takes_no_gradient_and_no_hook_is_left(pair, images: Tensor):
    model, teacher = pair
    settings = Settings(teacher="theirs", teacher_states=1.0)
    loss, _ = Objective(model, teacher, settings)(images, LABELS)
    loss.backward()
    assert all(p.grad is None for p in teacher.net.parameters())
    assert all(p.grad is not None for p in model.parameters())
    modules = [m for net in (model, teacher.net) for m in net.modules()]
    assert not any(m._forward_hooks for m in modules)
    with pytest.raises(RuntimeError):  # nor after a failure
        Objective(model, teacher, settings)(images[:, :2], LABELS)
    assert not any(m._forward_hooks for m in modules)


def test_stage_outputs_need_a_teacher_with_the_same_stages(tiny: OdeResNet):
    other = Teacher(nn.Linear(1, 1), "a stranger", tiny.info.preprocessing, tiny.info.preprocessing)
    with pytest.raises(UsageError, match=r"layer1, layer2, layer3\); a stranger has none that are known"):
        Objective(tiny, other, Settings(teacher="a stranger", teacher_states=1.0))
    Objective(tiny, other, Settings(teacher="a stranger"))


SETTINGS = Settings(
    adjoint="pc", batch_size=16, max_steps=6, lr=0.01, save_every=2, on_drift="warn", distill=0.5, teacher_states=0.5
)


def train(model: OdeResNet, teacher: Teacher, out: Path, settings: Settings, **kwargs):
    pre = model.info.preprocessing
    images = data.open_data("digits", pre, "train", augment=True, images=96, seed=settings.seed)
    test = data.open_data("digits", pre, "test", images=20)
    cpu = torch.device("cpu")
    return finetune(model, images, test, out=out, settings=settings, device=cpu, teacher=teacher, **kwargs)


def test_a_run_with_a_teacher_resumes_to_the_bit(pico: OdeResNet, tmp_path: Path, assert_ran_by):
    teacher = own_teacher(copy.deepcopy(pico), "pico")
    with torch.no_grad():
        for p in pico.parameters():
            p.mul_(0.9)
    settings = replace(SETTINGS, teacher="pico")
    model_file.save(pico, tmp_path / "m.safetensors")
    train(pico, teacher, tmp_path / "whole", settings)
    seen: list[object] = []
    stop = Callbacks(on_step=seen.append, should_stop=lambda: len(seen) >= 3)
    part = train(model_file.load(tmp_path / "m.safetensors"), teacher, tmp_path / "parts", settings, callbacks=stop)
    assert part.interrupted and part.steps == 3
    state = run_folder.load_state(tmp_path / "parts")
    assert state.settings["teacher_states"] == 0.5
    assert train(state.model, teacher, tmp_path / "parts", settings, resume=state).steps == 6
    whole = model_file.load(tmp_path / "whole" / "last.safetensors").state_dict()
    parts = model_file.load(tmp_path / "parts" / "last.safetensors").state_dict()
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    assert_ran_by(tmp_path / "parts", "pc")


@pytest.mark.slow
def test_distillation_alone_brings_a_network_back_to_its_teacher(pico: OdeResNet, tmp_path: Path):
    teacher = own_teacher(copy.deepcopy(pico), "pico")
    with torch.no_grad():
        for p in pico.parameters():
            p.add_(0.05 * torch.randn_like(p))
    pictures = data.open_data("digits", pico.info.preprocessing, "train", images=96)
    (batch,) = data.batches(pictures, 96)

    def distance() -> float:
        return distillation_loss(pico.eval()(batch.images), teacher.logits(batch.images), 2.0, several=False).item()

    before = distance()
    train(pico, teacher, tmp_path, replace(SETTINGS, teacher="pico", distill=1.0, teacher_states=0.0, max_steps=40))
    assert distance() < 0.5 * before


def test_a_resumed_command_finds_its_teacher_again(pico: OdeResNet, tmp_path: Path, capsys):
    net, out = tmp_path / "m.safetensors", tmp_path / "run"
    model_file.save(pico, net)
    command = ["finetune", str(net), "--data", "digits", "--images", "64", "--batch-size", "16", "-o", str(out)]
    quick = ["--max-steps", "2", "--adjoint", "backprop", "--teacher", str(net), "--distill", "0.7"]
    assert main([*command, *quick]) == 0
    assert run_folder.load_state(out).settings["distill"] == 0.7
    capsys.readouterr()
    assert main([*command, "--resume", "--max-steps", "4"]) == 0
    assert run_folder.load_state(out).settings["teacher"] == str(net)
