"""Networks for grey images, of other channels, of unequal sides and in other precisions, from source to export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from resode_cli.app import main
from resode_cli.bench.workload import Trial, Workload
from resode_cli.data.transforms import transform
from resode_cli.errors import ResodeError, UsageError
from resode_cli.files import model_file
from resode_cli.network.parts import Preprocessing, PreprocessingChoice, parse_size
from resode_cli.sources.cifar import CifarResNet
from resode_cli.sources.registry import open_source
from resode_cli.surgery.convert import convert, random_batch

NETS = """
import torch
from torch import nn
from resode_cli.sources.cifar import CifarResNet


def with_channels(channels):
    net = CifarResNet(2, num_classes=3, widths=(4, 8, 8))
    net.conv1 = nn.Conv2d(channels, 4, 3, padding=1, bias=False)
    return net


def rgb(): return with_channels(3)
def grey(): return with_channels(1)
def four(): return with_channels(4)
def double(): return with_channels(3).double()
def half(): return with_channels(1).bfloat16()


def into_channels():
    net = with_channels(12)
    net.conv1 = nn.Sequential(nn.PixelUnshuffle(2), net.conv1)
    return net


def scripted():
    net = with_channels(3)
    net.layer1[1].bn1 = torch.jit.script(net.layer1[1].bn1)
    return net
"""


@pytest.fixture
def nets(tmp_path: Path) -> Path:
    (tmp_path / "nets.py").write_text(NETS)
    return tmp_path / "nets.py"


def open_net(nets: Path, name: str, **preprocessing: object):
    return open_source(
        f"{nets}:{name}", pretrained=False, preprocessing=PreprocessingChoice(**{"size": 16, **preprocessing})
    )


SHAPES = {
    "rgb": (16, 3, torch.float32),
    "grey": ((24, 12), 1, torch.float32),
    "four": (16, 4, torch.float32),
    "double": ((8, 20), 3, torch.float64),
    "half": (16, 1, torch.bfloat16),
    "into_channels": (16, 3, torch.float32),
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_example_follows_the_network(name, nets, tmp_path):
    size, channels, dtype = SHAPES[name]
    source = open_net(nets, name, size=size)
    assert source.preprocessing.channels == channels
    model, check = convert(source)
    height, width = (size, size) if isinstance(size, int) else size
    assert check.batch == f"random images, {height}×{width}" and check.identical
    assert next(model.parameters()).dtype == dtype
    model_file.save(model, tmp_path / "m.safetensors")
    again = model_file.load(tmp_path / "m.safetensors", source=f"{nets}:{name}")
    assert again.info.preprocessing == source.preprocessing
    image = random_batch(again.info.preprocessing, 1)
    assert image.shape == (1, channels, height, width)
    assert torch.equal(again(image.to(dtype)), model(image.to(dtype)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_module_in_another_precision_converts_without_an_example(dtype):
    net = CifarResNet(2, widths=(4, 8, 8)).to(dtype)
    assert convert(net)[1].identical


@pytest.mark.parametrize("channels", [1, 2])
def test_a_module_of_other_channels_converts_without_an_example(channels):
    net = CifarResNet(2, widths=(4, 8, 8))
    net.conv1 = nn.Conv2d(channels, 4, 3, padding=1, bias=False)
    assert convert(net)[0].info.preprocessing.channels == channels


def test_a_square_is_one_number_and_a_file_of_before_is_read():
    assert Preprocessing(size=(8, 8)) == Preprocessing(size=8) and Preprocessing(size=[8, 4]).size == (8, 4)  # type: ignore
    assert [parse_size(text) for text in ("224", "256x128", "256,128", "64×32", "8x8")] == [
        224,
        (256, 128),
        (256, 128),
        (64, 32),
        8,
    ]


@pytest.mark.parametrize("text", ["0", "-1", "x", "8x0", "1e3", "8x8x8", "", "99999999999"])
def test_a_size_that_is_none_is_a_usage_error(text):
    with pytest.raises(UsageError, match="--input-size .*must be 1 or more pixels"):
        parse_size(text)


@pytest.mark.parametrize("name", ["rgb", "grey"])
def test_images_that_no_memory_holds_are_refused_before_they_are_made(name, nets):
    with pytest.raises(ResodeError, match=r"images of 100000×100000: .* are free; choose a smaller --input-size"):
        convert(open_net(nets, name, size=100_000))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_script_inside_is_one_sentence(nets):
    with pytest.raises(ResodeError, match=r"layer1\.1\.bn1 is a ScriptModule"):
        open_net(nets, "scripted")
    with pytest.raises(ResodeError, match="ScriptModule"):
        convert(torch.jit.script(CifarResNet(2, widths=(4, 8, 8))))


def test_grey_values_are_said_and_mean_and_std_must_be_as_many(nets):
    notes = open_net(nets, "grey").notes
    assert any("one channel, grey, mean 0.449 and std 0.226; --mean and --std say otherwise" in note for note in notes)
    chosen = open_net(nets, "grey", mean=(0.3,), std=(0.2,))
    assert chosen.preprocessing.mean == (0.3,) and not any("grey" in note for note in chosen.notes)
    with pytest.raises(UsageError, match="--mean has 3 numbers, but the network takes images of 1 channels"):
        open_net(nets, "grey", mean=(0.1, 0.2, 0.3))


# --- images ------------------------------------------------------------------------------------------------

PICTURE = Image.linear_gradient("L").resize((40, 30)).convert("RGB")  # 40 wide, 30 high; darker above


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("size", [(24, 12), (12, 24), (96, 48), 16])
@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_become_the_networks_size_and_channels(mode, augment, size, channels):
    pre = Preprocessing(size=size, crop_mode=mode, crop_fraction=0.9, mean=(0.5,) * channels, std=(0.5,) * channels)
    for picture in (PICTURE, PICTURE.rotate(90, expand=True)):
        assert transform(pre, augment=augment)(picture).shape == (channels, pre.height, pre.width)


def test_height_and_width_are_not_mixed_up():
    """The gradient runs along the height: rows are constant, and all of it is seen in a tall image."""
    pre = Preprocessing(size=(30, 20), crop_fraction=1.0, mean=(0.0,), std=(1.0,))
    image = transform(pre, augment=False)(PICTURE)
    assert image.shape == (1, 30, 20) and float((image - image[..., :1]).abs().max()) < 0.01
    assert float(image[0, 0, 0]) < 0.1 and float(image[0, -1, 0]) > 0.9


def test_grey_is_the_weighted_sum_of_the_colours():
    pre = Preprocessing(size=4, crop_fraction=1.0, mean=(0.0,), std=(1.0,))
    image = transform(pre, augment=False)(Image.new("RGB", (4, 4), (255, 0, 0)))
    assert float(image.max()) == pytest.approx(0.299, abs=0.003)


def test_a_folder_of_pictures_has_no_fourth_channel():
    with pytest.raises(ResodeError, match="takes images of 4 channels"):
        transform(Preprocessing(mean=(0.0,) * 4, std=(1.0,) * 4), augment=False)


# --- the command line --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "size"), [("grey", "16"), ("rgb", "16x24")])
def test_the_commands_go_by_the_networks_shape(name, size, nets, make_folder, tmp_path, capsys):
    model, source = str(tmp_path / "m.safetensors"), f"{nets}:{name}"
    data = str(make_folder(size=20))
    assert main(["convert", source, "--no-pretrained", "--input-size", size, "-o", model]) == 0
    assert json.loads(json.dumps(model_file.read_metadata(Path(model))))["preprocessing"]["size"] in (16, [16, 24])
    assert main(["info", model]) == 0
    assert f"preprocessing  {'16×16 grey' if name == 'grey' else '16×24'} bilinear" in capsys.readouterr().out
    assert main(["eval", model, "--data", data]) == 0
    assert main(["export", model, "-o", str(tmp_path / "plain.safetensors")]) == 0
    run = ["--max-steps", "1", "--batch-size", "4", "--adjoint", "checkpoint", "-o", str(tmp_path / "run")]
    assert main(["finetune", model, "--data", data, *run]) == 0, capsys.readouterr().err
    trial = Trial(Workload(model, source, input_size=parse_size("12x8"), batch_size=2), None)
    assert trial.inputs.shape == (2, 1 if name == "grey" else 3, 12, 8)


def test_one_value_per_channel_is_one_sentence(nets, make_folder, tmp_path, capsys):
    model = str(tmp_path / "m.safetensors")
    assert main(["convert", f"{nets}:rgb", "--no-pretrained", "--input-size", "1", "-o", model]) == 0
    run = [
        "--max-steps",
        "1",
        "--batch-size",
        "1",
        "--bn",
        "batch",
        "--adjoint",
        "checkpoint",
        "-o",
        str(tmp_path / "run"),
    ]
    assert main(["finetune", model, "--data", str(make_folder()), *run]) == 1
    assert "one value per channel" in capsys.readouterr().err
