"""Fixtures shared by the tests: tiny networks with random statistics, image folders, the real data if there is any."""

from __future__ import annotations

import copy
import gc
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath

import pytest
import torch
from PIL import Image
from torch import nn

from resode_cli.app import main
from resode_cli.files import model_file
from resode_cli.network.model import ModelInfo, OdeResNet
from resode_cli.network.parts import Preprocessing, PreprocessingChoice, Source, SourceSpec
from resode_cli.sources.cifar import CifarResNet
from resode_cli.sources.registry import open_source
from resode_cli.surgery.convert import convert
from resode_cli.training import run_folder

if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: more threads would be in each other's way
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"

TINY_SIZE = 16
TINY_NET = """
from resode_cli.sources.cifar import CifarResNet


def make(num_classes=5):
    return CifarResNet(3, num_classes=num_classes, widths=(4, 8, 8))


def make_long(num_classes=5):
    return CifarResNet(9, num_classes=num_classes, widths=(2, 4, 4))
"""
PICO_NET = (
    "from resode_cli.sources.cifar import CifarResNet\ndef small():\n    return CifarResNet(2, widths=(4, 8, 8))\n"
)
PICO_PREPROCESSING = Preprocessing(size=8, crop_fraction=1.0)


def pytest_collection_finish() -> None:
    """Torch, timm and torchvision hold a million objects, which the garbage collector needs not look through."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Real networks first: the longest tests, which one process should not be left with at the end."""
    items.sort(key=lambda item: item.get_closest_marker("real") is None)


@pytest.fixture(autouse=True)
def seed():
    """Every test draws the same random numbers, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def trust(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most model files of these tests are of networks that a test's own file builds: let them, as --trust-source does.

    `test_untrusted_files.py`, which asks what happens without, is left out by its mark.
    """
    if "untrusted" not in request.keywords:
        ask = model_file.origin_of
        monkeypatch.setattr(model_file, "origin_of", lambda origin, source, **_: ask(origin, source, trust_source=True))


def _heed_signals() -> None:
    """What runs in the background ignores SIGINT, and under nohup SIGHUP; its children would too."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start `resode ARGUMENTS` in `tmp_path`, in a process group of its own, with `stderr` to read.

    `until` names a file of that folder: the call returns once it exists. A test that fails leaves no process behind,
    nor an open pipe, which would fail another test.
    """
    processes: list[subprocess.Popen[str]] = []

    def begin(*arguments: str, until: str | None = None) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "resode_cli", *arguments],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=_heed_signals,
        )
        processes.append(process)
        deadline = time.monotonic() + 120
        while until is not None and not (tmp_path / until).exists():
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                pytest.fail(f"resode {' '.join(arguments)} wrote no {until}: {process.communicate()[1]}")
            time.sleep(0.05)
        return process

    yield begin
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture(scope="session")
def randomise() -> Callable[[nn.Module], nn.Module]:
    """Give every norm random weights and statistics.

    timm's last norms start at zero, and with them every branch: any two formulas would agree.
    """

    def apply(net: nn.Module) -> nn.Module:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for module in net.modules():
                if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)):
                    module.weight.uniform_(0.3, 1.0, generator=generator)
                    module.bias.normal_(0.0, 0.2, generator=generator)
                if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
                    module.running_mean.normal_(0.0, 0.2, generator=generator)
                    module.running_var.uniform_(0.5, 1.5, generator=generator)
                    module.num_batches_tracked.fill_(7)
        return net

    return apply


_converted: dict[tuple[object, ...], tuple[OdeResNet, torch.Tensor]] = {}


def _once(make: Callable[[], OdeResNet], source: SourceSpec, *key: object) -> OdeResNet:
    """What `make` converts, which is a copy where it has been made before from the same random numbers.

    Most tests begin with one of a few networks, and to convert one takes ten times as long as to copy it.
    """
    key = (*key, torch.get_rng_state().numpy().tobytes())
    if key not in _converted:
        _converted[key] = make(), torch.get_rng_state()
    model, random_state = _converted[key]
    torch.set_rng_state(random_state)
    own = copy.deepcopy(model)
    own.info = replace(own.info, source=replace(own.info.source, name=source.name))
    return own


@pytest.fixture(scope="session")
def make_pico() -> Callable[[Path], OdeResNet]:
    """A user's own network for 8×8 images in `pre` form, small enough to train in a test: 2, 1 and 1 steps.

    Its source file is written to the folder.
    """

    def make(folder: Path) -> OdeResNet:
        (folder / "net.py").write_text(PICO_NET)
        torch.manual_seed(0)
        source = SourceSpec("file", f"{folder / 'net.py'}:small")

        def built() -> OdeResNet:
            return convert(Source(source, CifarResNet(2, widths=(4, 8, 8)), PICO_PREPROCESSING), form="pre")[0]

        return _once(built, source, "pico")

    return make


@pytest.fixture
def pico(make_pico: Callable[[Path], OdeResNet], tmp_path: Path) -> OdeResNet:
    return make_pico(tmp_path)


@pytest.fixture
def info() -> ModelInfo:
    """What `assemble` wants to know of a network that comes from no library."""
    return ModelInfo(SourceSpec("file", "net.py:make"), Preprocessing(size=TINY_SIZE), 5)


@pytest.fixture
def tiny_file(tmp_path: Path) -> Path:
    """A user's own source file; its `make` has stages of 3, 2 and 2 steps, its `make_long` of 9, 8 and 8."""
    path = tmp_path / "net.py"
    path.write_text(TINY_NET)
    return path


@pytest.fixture
def build_tiny(tiny_file: Path, randomise) -> Callable[..., OdeResNet]:
    """Convert a tiny network from the user's file; arguments are those of `convert`."""

    def build(function: str = "make", **arguments) -> OdeResNet:
        def make() -> OdeResNet:
            preprocessing = PreprocessingChoice(size=TINY_SIZE, crop_fraction=1.0)
            source = open_source(f"{tiny_file}:{function}", pretrained=False, preprocessing=preprocessing)
            randomise(source.net)
            return convert(source, **arguments)[0]

        return _once(make, SourceSpec("file", f"{tiny_file}:{function}"), function, *sorted(arguments.items()))

    return build


@pytest.fixture
def tiny(build_tiny) -> OdeResNet:
    return build_tiny()


@pytest.fixture
def images() -> torch.Tensor:
    """A batch for the tiny network."""
    return torch.randn(4, 3, TINY_SIZE, TINY_SIZE, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """Write an image folder: NAME/SPLIT/CLASS/0.png …, noise of the given size."""

    def make(
        name: str = "pictures",
        *,
        classes=("cat", "dog", "owl"),
        splits=("train", "test"),
        each: int = 3,
        size: int = 16,
    ) -> Path:
        generator = torch.Generator().manual_seed(3)
        for split in splits:
            for label in classes:
                folder = tmp_path / name / split / label
                folder.mkdir(parents=True)
                for i in range(each):
                    pixels = torch.randint(0, 256, (size, size, 3), generator=generator, dtype=torch.uint8)
                    Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
        return tmp_path / name

    return make


@pytest.fixture
def answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> Callable[..., tuple[dict, str]]:
    """Run a command with --json in `tmp_path`; what it gave and what it said besides. code: its exit code."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, code: int = 0) -> tuple[dict, str]:
        capsys.readouterr()
        found = main([*map(str, arguments), "--json"])
        out, said = capsys.readouterr()
        assert found == code, said
        return json.loads(out) if out else {}, said

    return run


@pytest.fixture(scope="session")
def assert_ran_by() -> Callable[..., None]:
    """Assert which method ran every stage of a finished run, from the first step to the last.

    A test that credits a method asks this: a run ends well, and learns, with stages that the monitor moved to anchors
    too. Those are named in `moved`, and run by checkpoint from then on.
    """

    def check(out: Path, methods: str | dict[str, str], *, moved: Sequence[str] = ()) -> None:
        guard = model_file.read_metadata(out / run_folder.STATE)["run"]["progress"]["guard"]
        ran = {part: adjoint["method"] for part, adjoint in guard["adjoints"].items()}
        stages = {part: method for part, method in ran.items() if part != "stem" and not part.endswith(" transition")}
        named = dict.fromkeys(stages, methods) if isinstance(methods, str) else methods
        assert stages and stages == {**named, **dict.fromkeys(moved, "checkpoint")}
        assert (guard["moved_to_anchors"], guard["recalibrations"]) == ([*moved], 0)

    return check


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real weights and images: beside the repository, or where RESODE_TEST_DATA says."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("RESODE_TEST_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no pretrained networks and images in {folder}; RESODE_TEST_DATA says where they are")
    return folder


@pytest.fixture(scope="session")
def cifar10(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIFAR-10 as an image folder: the test images, and the first 200 training images of each class.

    All 50,000 would cost more time to unpack than most tests take, and pytest keeps the folder.
    """
    archive = shared_data / "cifar10_jpeg.tar.gz"
    if not archive.is_file():
        pytest.skip(f"no {archive.name} in {shared_data}")
    target = tmp_path_factory.mktemp("images")
    with tarfile.open(archive) as file:
        file.extractall(target, members=_wanted(file), filter="data")
    return target / "cifar10"


def _wanted(file: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in file:
        path = PurePosixPath(member.name)
        if member.isfile() and ("test" in path.parts or int(path.stem) < 200):
            yield member
