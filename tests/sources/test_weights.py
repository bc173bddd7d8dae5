"""Files of weights: whatever they are wrapped in, loaded whole or refused by name."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from resode_cli.errors import ResodeError, UsageError
from resode_cli.sources.cifar import CifarResNet
from resode_cli.sources.registry import open_source
from resode_cli.sources.weights import load_weights, read_state_dict, state_sha256

State = dict[str, Tensor]


def tiny_net(num_classes: int = 5) -> CifarResNet:
    return CifarResNet(2, num_classes=num_classes, widths=(4, 8, 8))


@pytest.fixture
def state(randomise) -> State:
    return randomise(tiny_net()).state_dict()


def assert_loads(path: Path, state: State) -> None:
    net = tiny_net()
    assert load_weights(net, path, num_classes=None) == []
    loaded = net.state_dict()
    assert set(loaded) == set(state)
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".th", ".tar", ".pth.tar", ".bin", ".safetensors"])
def test_every_kind_of_file_loads_to_the_last_bit(suffix: str, state: State, tmp_path):
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    assert_loads(path, state)


def test_the_file_format_before_zip_archives_loads(state: State, tmp_path):
    path = tmp_path / "old.pth"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    assert_loads(path, state)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_ema"])
def test_wrappers_are_opened(wrapper: str, state: State, tmp_path):
    torch.save({"epoch": 3, wrapper: state, "best_prec1": 91.5}, tmp_path / "weights.pth")
    assert_loads(tmp_path / "weights.pth", state)


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "module.model."])
def test_prefixes_are_removed(prefix: str, state: State, tmp_path):
    torch.save({"state_dict": {prefix + key: value for key, value in state.items()}}, tmp_path / "weights.pth")
    assert_loads(tmp_path / "weights.pth", state)


def test_a_network_whose_own_names_start_with_a_prefix_loads(tmp_path):
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny_net()

    torch.save(Wrapped().state_dict(), tmp_path / "weights.pth")
    net = Wrapped()
    load_weights(net, tmp_path / "weights.pth", num_classes=None)
    assert torch.equal(net.model.conv1.weight, torch.load(tmp_path / "weights.pth")["model.conv1.weight"])


def test_batch_counters_may_be_missing(state: State, tmp_path):
    torch.save({k: v for k, v in state.items() if "num_batches_tracked" not in k}, tmp_path / "weights.pth")
    net = tiny_net()
    assert load_weights(net, tmp_path / "weights.pth", num_classes=None) == []
    assert torch.equal(net.bn1.running_mean, state["bn1.running_mean"])


def without(state: State, key: str) -> State:
    return {k: v for k, v in state.items() if k != key}


MISFITS = {
    "missing": (lambda s: without(s, "layer2.1.conv2.weight"), r"1 missing: layer2\.1\.conv2\.weight"),
    "unexpected": (lambda s: {**s, "layer9.bias": torch.zeros(2)}, r"1 unexpected: layer9\.bias"),
    "shape": (
        lambda s: {**s, "bn1.weight": torch.zeros(3)},
        r"1 wrong shape: bn1\.weight \(3,\) instead of \(4,\)",
    ),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_tensors_that_do_not_fit_are_named(kind: str, state: State, tmp_path):
    change, message = MISFITS[kind]
    torch.save(change(state), tmp_path / "weights.pth")
    net = tiny_net()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(ResodeError, match=rf"weights\.pth: does not fit CifarResNet: {message}"):
        load_weights(net, tmp_path / "weights.pth", num_classes=None)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


class Attack:
    """Creates a file when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("save", ["torch", "pickle"])
def test_code_in_a_pickle_is_refused_and_never_run(save: str, state: State, tmp_path):
    path, target = tmp_path / "weights.pth", tmp_path / "was-run"
    content = {"state_dict": state, "extra": Attack(target)}
    if save == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(ResodeError, match=r"weights\.pth: .*"):
        read_state_dict(path)
    assert not target.exists()


@pytest.mark.parametrize("what", ["function", "network"])
def test_a_pickle_of_python_objects_is_refused_with_what_to_do(what: str, state: State, tmp_path):
    content = {"state_dict": state, "extra": os.getcwd} if what == "function" else tiny_net()
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(ResodeError, match="objects other than tensors.*save its state_dict alone"):
        read_state_dict(tmp_path / "weights.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.99])
def test_a_file_cut_short_is_refused(suffix: str, kept: float, state: State, tmp_path):
    path = tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ResodeError, match=rf"weights\{suffix}: .*(cut short|not a complete)"):
        read_state_dict(path)


@pytest.mark.parametrize("kept", [0.02, 0.5, 0.99])
def test_an_old_file_cut_short_is_refused(kept: float, state: State, tmp_path):
    path = tmp_path / "old.pth"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ResodeError, match=r"old\.pth: .*cut short"):
        read_state_dict(path)


@pytest.mark.parametrize("text", ["Not found\n", "<!DOCTYPE html>\n", "version https://git-lfs.github.com/spec/v1\n"])
def test_a_failed_download_is_not_taken_for_a_pickle_of_objects(text: str, tmp_path):
    (tmp_path / "weights.pth").write_text(text)
    with pytest.raises(ResodeError, match=r"weights\.pth: not a file of weights"):
        read_state_dict(tmp_path / "weights.pth")


@pytest.mark.parametrize(
    "content",
    [{}, {"state_dict": {}}, {"epoch": 3}, [torch.zeros(2)], torch.zeros(2)],
    ids=["nothing", "empty wrapper", "no tensors", "list", "tensor"],
)
def test_a_file_without_a_state_dict_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(ResodeError, match=r"weights\.pth: (no state dict|holds)"):
        read_state_dict(tmp_path / "weights.pth")


def test_a_missing_file_and_an_unknown_kind_are_usage_errors(tmp_path):
    with pytest.raises(UsageError, match="'.*none.pth' does not exist"):
        read_state_dict(tmp_path / "none.pth")
    (tmp_path / "weights.onnx").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"unknown kind \(allowed: .*\.safetensors"):
        read_state_dict(tmp_path / "weights.onnx")


def test_another_number_of_classes_starts_a_new_head_and_says_so(state: State, tmp_path):
    torch.save(state, tmp_path / "weights.pth")
    net = tiny_net(num_classes=3)
    initial = net.linear.weight.clone()
    (note,) = load_weights(net, tmp_path / "weights.pth", num_classes=3)
    assert "has 5 classes" in note and "'linear' starts at random for 3" in note
    assert torch.equal(net.linear.weight, initial)
    assert torch.equal(net.conv1.weight, state["conv1.weight"])


def test_the_same_number_of_classes_keeps_the_head(state: State, tmp_path):
    torch.save(state, tmp_path / "weights.pth")
    net = tiny_net()
    assert load_weights(net, tmp_path / "weights.pth", num_classes=5) == []
    assert torch.equal(net.linear.weight, state["linear.weight"])


def test_a_misfitting_head_hints_at_num_classes(state: State, tmp_path):
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ResodeError, match=r"linear\.weight.*the file has 5 classes: try --num-classes 5"):
        load_weights(tiny_net(num_classes=3), tmp_path / "weights.pth", num_classes=None)


def test_a_source_records_its_weights(tiny_file, randomise, tmp_path):
    net = open_source(f"{tiny_file}:make", pretrained=False).net
    torch.save(randomise(net).state_dict(), tmp_path / "mine.pth")
    source = open_source(f"{tiny_file}:make", weights=tmp_path / "mine.pth")
    assert source.spec.weights == "mine.pth"
    assert source.spec.weights_sha256 == state_sha256(net.state_dict())
    assert not any("random" in note for note in source.notes)


def test_the_hash_depends_on_names_and_values(state: State):
    first = next(iter(state))
    renamed = {("other" if key == first else key): value for key, value in state.items()}
    changed = {**state, first: state[first] + 1e-3}
    assert state_sha256(dict(reversed(state.items()))) == state_sha256(state)
    assert len({state_sha256(s) for s in (state, renamed, changed)}) == 3
