"""Other names for classes, in the files that people have them in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from resode_cli.data import open_data
from resode_cli.data.class_map import read_class_map
from resode_cli.errors import UsageError
from resode_cli.files import model_file
from resode_cli.network.parts import Preprocessing

PLAIN = Preprocessing(size=8, crop_fraction=1.0)
FISH = ["n01440764", "n01443537", "n01484850"]
NAMES = ["tench", "goldfish", "great white shark, white shark"]


def written(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.csv", "".join(f'{key},"{name}"\n' for key, name in zip(FISH, NAMES, strict=True))),
        ("a.csv", "folder,name\n" + "".join(f'{key},"{name}"\n' for key, name in zip(FISH, NAMES, strict=True))),
        ("a.tsv", "".join(f"{key}\t{name}\n" for key, name in zip(FISH, NAMES, strict=True))),
        ("a.txt", "".join(f"{key} {name}\n" for key, name in zip(FISH, NAMES, strict=True))),
        ("a.txt", "".join(f"{key}\t{name}\n" for key, name in zip(FISH, NAMES, strict=True))),
        ("a.json", json.dumps(dict(zip(FISH, NAMES, strict=True)))),
        ("a.json", json.dumps({str(i): pair for i, pair in enumerate(zip(FISH, NAMES, strict=True))})),
    ],
)
def test_names_are_mapped(name: str, text: str, tmp_path: Path):
    found = read_class_map(written(tmp_path, name, text))
    assert found.applied_to(FISH) == NAMES and found.applied_to(FISH[1:]) == NAMES[1:]
    assert found.applied_to(NAMES) == NAMES  # of a model that has them already
    assert found.of_outputs(None, 3) == NAMES and found.of_outputs(None, 4) is None
    with pytest.raises(UsageError, match="knows none of the classes cat, dog; it is of n01440764"):
        found.applied_to(["cat", "dog"])


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.txt", "\n".join(NAMES)),
        ("a.json", json.dumps(NAMES)),
        ("a.json", json.dumps({str(i): name for i, name in reversed(list(enumerate(NAMES)))})),
        ("a.csv", 'name\ntench\ngoldfish\n"great white shark, white shark"\n'.replace("name", "class")),
    ],
)
def test_names_are_in_the_order_of_the_classes(name: str, text: str, tmp_path: Path):
    found = read_class_map(written(tmp_path, name, text))
    assert found.applied_to(FISH) == NAMES and found.of_outputs(None, 3) == NAMES
    with pytest.raises(UsageError, match="has 3 names in order, and there are 2 classes"):
        found.applied_to(FISH[:2])


@pytest.mark.parametrize("text", ["n02012849 crane\nn03126707 crane\nn01440764 tench", "crane\ncrane\ntench"])
def test_a_name_of_two_classes_is_told_apart(text: str, tmp_path: Path):
    found = read_class_map(written(tmp_path, "a.txt", text)).of_outputs(None, 3)
    assert found is not None and len(set(found)) == 3 and {name.split(" ")[0] for name in found} == {"crane", "tench"}


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.txt", "\n", "it is empty"),
        ("a.csv", "a,x\nb,\n", "a name is empty"),
        ("a.csv", "a,x\nb\n", "row 2 has one cell"),
        ("a.csv", "a,x\na,y\n", "has two lines of a"),
        ("a.json", "{", "is no JSON"),
        ("a.json", "3", "write "),
        ("a.json", '{"a": 1}', "write "),
    ],
)
def test_a_file_that_is_no_map_is_one_line(name: str, text: str, message: str, tmp_path: Path):
    with pytest.raises(UsageError, match=f"--class-map .*{message}") as error:
        read_class_map(written(tmp_path, name, text))
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path):
    with pytest.raises(UsageError, match="--class-map .*none.csv cannot be read: No such file"):
        read_class_map(tmp_path / "none.csv")


def test_the_data_keep_their_order_under_other_names(make_folder, tmp_path: Path):
    folder = make_folder(classes=FISH, each=1)
    found = read_class_map(written(tmp_path, "a.json", json.dumps({FISH[0]: "zebra", FISH[1]: "adder"})))
    assert open_data(str(folder), PLAIN, "train", class_map=found).class_names == ("zebra", "adder", FISH[2])


def test_names_stay_in_the_model_that_is_trained(make_folder, answer, tmp_path: Path):
    folder = make_folder(classes=FISH, each=2, size=8)
    names = written(tmp_path, "names.txt", "\n".join(f"{key} {name}" for key, name in zip(FISH, NAMES, strict=True)))
    Path("net.py").write_text(
        "from resode_cli.sources.cifar import CifarResNet\n"
        "def make(): return CifarResNet(1, num_classes=3, widths=(2, 4, 4))\n"
    )
    answer("convert", "net.py:make", "--no-pretrained", "--input-size", 8, "-o", "m.safetensors")
    training = "--adjoint backprop --max-steps 1 --batch-size 4 --device cpu".split()
    answer("finetune", "m.safetensors", "--data", folder, "-o", "run", "--class-map", names, *training)
    best = Path("run/best.safetensors")
    assert list(model_file.read_metadata(best)["class_names"]) == NAMES
    answer("eval", best, "--data", folder, "--class-map", names)
    answer("eval", best, "--data", folder)
    answer("finetune", "m.safetensors", "--data", folder, "-o", "plain", *training)
    answer("eval", "plain/last.safetensors", "--data", folder, "--class-map", names)
    image = folder / "test" / FISH[0] / "0.png"
    for model in ("m.safetensors", "plain/last.safetensors", best):
        found, _ = answer("predict", model, image, "--top", 3, "--class-map", names)
        assert sorted(str(found).count(f"'{name}'") for name in NAMES) == [1, 1, 1]
    names.write_text("one\ntwo\n")
    _, said = answer("predict", "m.safetensors", image, "--class-map", names, code=2)
    assert "it is of another number of classes than the model, which has 3" in said
    _, said = answer("untie", "m.safetensors", "-o", "x.safetensors", "--class-map", names, code=2)
    assert "--class-map says something of --data; add --data" in said
