"""What trackers are told, by a module that stands in for each; and TensorBoard itself, where it is."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from small_runs import run

from resode_cli.app import main
from resode_cli.training.run_folder import load_state
from resode_cli.training.trackers import scalars


class Heard:
    """What the fake modules were told: sessions, each with its settings, rows and end."""

    def __init__(self) -> None:
        self.begun: list[dict[str, Any]] = []
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.ended: list[Any] = []
        self.summary: dict[str, float] = {}

    def log(self, figures: dict[str, float], step: int) -> None:
        if any(name.startswith("summary/") for name in figures):
            self.summary |= figures
        else:
            self.rows.append((step, figures))


def fake_tensorboard(heard: Heard) -> ModuleType:
    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int | None = None) -> None:
            heard.begun.append({"id": Path(folder).name, "resumes": purge_step})

        def add_text(self, tag: str, text: str, step: int) -> None:
            heard.begun[-1]["settings"] = text

        def add_scalar(self, name: str, value: float, step: int) -> None:
            if heard.rows and heard.rows[-1][0] == step and name not in heard.rows[-1][1]:
                heard.rows[-1][1][name] = value
            else:
                heard.rows.append((step, {name: value}))

        def add_hparams(self, settings: dict[str, Any], summary: dict[str, float], run_name: str) -> None:
            heard.summary |= summary

        def flush(self) -> None: ...

        def close(self) -> None:
            heard.ended.append(None)

    return module("torch.utils.tensorboard", SummaryWriter=SummaryWriter)


def fake_wandb(heard: Heard) -> ModuleType:
    def init(*, id: str, resume: str, config: dict[str, Any], dir: str, **more: Any) -> Any:
        assert resume == "allow" and Path(dir).is_dir()
        heard.begun.append({"id": id, "settings": config, **more})
        summary = SimpleNamespace(update=heard.summary.update)
        return SimpleNamespace(log=heard.log, summary=summary, finish=lambda exit_code: heard.ended.append(exit_code))

    return module("wandb", init=init)


def fake_mlflow(heard: Heard) -> ModuleType:
    runs: dict[str, str] = {}  # by tag

    def search_runs(experiments: list[str], condition: str, max_results: int) -> list[Any]:
        found = [number for token, number in runs.items() if f"tags.resode_run = '{token}'" == condition]
        return [SimpleNamespace(info=SimpleNamespace(run_id=number)) for number in found]

    def start_run(run_id: str | None = None, run_name: str = "", tags: dict[str, str] | None = None) -> None:
        token = (tags or {}).get("resode_run") or next(token for token, number in runs.items() if number == run_id)
        runs.setdefault(token, f"number {len(runs)}")
        heard.begun.append({"id": token, "name": run_name})

    return module(
        "mlflow",
        set_experiment=lambda name: SimpleNamespace(experiment_id=name),
        MlflowClient=lambda: SimpleNamespace(search_runs=search_runs),
        start_run=start_run,
        log_params=lambda values: heard.begun[-1].update(settings=values),
        log_metrics=heard.log,
        end_run=heard.ended.append,
    )


def fake_trackio(heard: Heard) -> ModuleType:
    def init(*, name: str, config: dict[str, Any], resume: str, **more: Any) -> None:
        assert resume == "allow"
        heard.begun.append({"id": name.rpartition("-")[2], "settings": config, **more})

    return module("trackio", init=init, log=heard.log, finish=lambda: heard.ended.append(None))


def module(name: str, **contents: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(contents)
    return made


FAKES = {"tensorboard": fake_tensorboard, "wandb": fake_wandb, "mlflow": fake_mlflow, "trackio": fake_trackio}


def hear(name: str, monkeypatch: pytest.MonkeyPatch) -> Heard:
    heard = Heard()
    made = FAKES[name](heard)
    monkeypatch.setitem(sys.modules, made.__name__, made)
    return heard


def logged(folder: str) -> list[dict[str, str]]:
    with (Path(folder) / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", FAKES)
def test_a_tracker_gets_settings_every_row_and_the_end(name: str, here: Path, monkeypatch: Any) -> None:
    heard = hear(name, monkeypatch)
    assert main(run("-o", "new", "--track", name, "--log-every", "1", "--lr", "0.0125")) == 0
    rows = logged("new")
    assert [step for step, _ in heard.rows] == [int(row["step"]) for row in rows] and len(rows) == 5
    for (_, figures), row in zip(heard.rows, rows, strict=True):
        assert figures[f"{row['split']}/loss"] == float(row["loss"])
        assert figures[f"{row['split']}/top1"] == float(row["top1"])
    assert heard.rows[1][1]["lr"] == 0.0125
    (begun,) = heard.begun
    assert begun["id"] == load_state(here / "new").fingerprint["run"]
    settings = begun["settings"]
    if name == "tensorboard":
        assert "| lr | 0.0125 |" in settings and "| data | digits |" in settings
    else:
        assert (str(settings["lr"]), settings["data"]) == ("0.0125", "digits") and "teacher" not in settings
    assert heard.summary["summary/steps"] == 3 and 0 <= heard.summary["summary/after_top1"] <= 1
    assert heard.ended in ([None], [0], ["FINISHED"])


@pytest.mark.parametrize("name", FAKES)
def test_a_resumed_run_goes_on_in_the_trackers_run(name: str, here: Path, monkeypatch: Any) -> None:
    heard = hear(name, monkeypatch)
    assert main(run("-o", "new", "--track", name, "--log-every", "1", steps=2)) == 0
    assert main(run("-o", "new", "--resume", "--log-every", "1", steps=3)) == 0
    assert len(heard.begun) == 2 and heard.begun[0]["id"] == heard.begun[1]["id"]
    assert [step for step, figures in heard.rows if "train/loss" in figures] == [1, 2, 3]
    if name == "tensorboard":
        assert [begun["resumes"] for begun in heard.begun] == [None, 3]
    assert main(run("-o", "new", "--resume", "--track", "none", steps=4)) == 0
    assert len(heard.begun) == 2


def test_several_trackers_hear_the_same_and_one_that_fails_ends_nothing(
    here: Path, monkeypatch: Any, capsys: Any
) -> None:
    first, second = hear("wandb", monkeypatch), hear("trackio", monkeypatch)
    calls = [0]

    def fail(figures: dict[str, float], step: int) -> None:
        calls[0] += 1
        raise OSError("no route to host\nand more")

    first.log = fail  # type: ignore[method-assign]
    assert main(run("-o", "new", "--track", "wandb, trackio", "--log-every", "1")) == 0
    assert calls == [1] and len(second.rows) == len(logged("new")) == 5
    said = capsys.readouterr().err
    assert said.count("wandb failed (no route to host), and hears no more of this run; log.csv does") == 1


@pytest.mark.parametrize("name", FAKES)
def test_one_that_cannot_begin_is_said_once(name: str, here: Path, monkeypatch: Any, capsys: Any) -> None:
    heard = hear(name, monkeypatch)
    heard.begun = None  # type: ignore[assignment]
    assert main(run("-o", "new", "--track", name, "--log-every", "1")) == 0
    assert capsys.readouterr().err.count("failed (") == 1 and not heard.rows and not heard.ended


def test_what_a_tracker_prints_is_no_result(here: Path, monkeypatch: Any, capsys: Any) -> None:
    hear("trackio", monkeypatch)
    monkeypatch.setattr(sys.modules["trackio"], "log", lambda figures, step: print("* logged"))
    assert main(run("-o", "new", "--track", "trackio", "--json")) == 0
    out, error = capsys.readouterr()
    assert json.loads(out)["steps"] == 3 and "* logged" in error


def test_a_run_that_ends_badly_is_no_finished_one(here: Path, monkeypatch: Any) -> None:
    heard = hear("mlflow", monkeypatch)
    assert main(run("-o", "new", "--track", "mlflow", "--lr", "1e38")) == 1
    assert heard.ended == ["KILLED"]


@pytest.mark.parametrize("name", FAKES)
def test_a_package_that_is_missing_is_named_before_anything_begins(
    name: str, here: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    assert main(run("-o", "new", "--track", name, model="none.safetensors")) == 1
    assert f"--track {name} needs the package {name}" in (said := capsys.readouterr().err) and said.count("\n") == 1
    assert f"pip install 'resode[{name}]'" in said and not Path("new").exists()


@pytest.mark.parametrize("text", ["wandbb", "wandb,", "none,wandb", ""])
def test_an_unknown_tracker_is_refused(text: str, here: Path, capsys: Any) -> None:
    assert main(run("-o", "new", "--track", text)) == 2
    assert "unknown tracker" in capsys.readouterr().err


def test_names_of_scalars() -> None:
    row = {"split": "train", "step": 4, "epoch": 1, "loss": 2.0, "lr": 0.1, "peak_bytes": 7, "drift_layer1_0": 1e-3}
    assert scalars(row) == {"epoch": 1, "train/loss": 2, "lr": 0.1, "peak_bytes": 7, "drift/layer1_0": 1e-3}


@pytest.mark.filterwarnings("ignore")  # its own
def test_tensorboard_itself(here: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main(run("-o", "new", "--track", "tensorboard", "--log-every", "1", steps=2)) == 0
    assert main(run("-o", "new", "--resume", "--log-every", "1", steps=3)) == 0
    (folder,) = (here / "new" / "tensorboard").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    found = {event.step: event.value for event in events.Scalars("train/loss")}
    rows = {int(row["step"]): float(row["loss"]) for row in logged("new") if row["split"] == "train"}
    assert found == pytest.approx(rows) and len(found) == 3
    assert "summary/best_top1" in events.Tags()["scalars"]
