"""`resode export --push`, with a stand-in for the hub: nothing leaves this machine."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
from timm.models import save_for_hf

from resode_cli.files.hub import CARD

Run = Callable[..., subprocess.CompletedProcess[str]]
PLAIN = ("--format", "safetensors")  # the quickest


class Hub:
    """Keeps what it is given: repositories, with their files' contents and whether they are private."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}

    def __call__(self, **_: Any) -> Hub:
        return self

    def create_repo(self, repository: str, *, private: bool | None, exist_ok: bool) -> Any:
        assert exist_ok
        self.files.setdefault(repository, {})
        self.private.setdefault(repository, bool(private))

        class Address(str):
            repo_id = repository

        return Address(f"https://hub/{repository}")

    def model_info(self, repository: str) -> Any:
        return SimpleNamespace(private=self.private[repository])

    def file_exists(self, repository: str, name: str) -> bool:
        return name in self.files[repository]

    def create_commit(self, repository: str, operations: list[Any], *, commit_message: str) -> None:
        for operation in operations:
            with operation.as_file() as file:
                self.files[repository][operation.path_in_repo] = file.read()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "a token")
    return hub


def test_what_was_written_is_pushed_with_a_card(run: Run, model: str, hub: Hub) -> None:
    result = run("export", *PLAIN, "--push", "me/net", "--private", "--json")
    assert "pushed to https://hub/me/net" in result.stderr
    document = json.loads(result.stdout)
    assert document["pushed"] == "https://hub/me/net" and hub.private["me/net"]
    files = hub.files["me/net"]
    assert sorted(files) == [CARD, "m-plain.safetensors"]
    assert files["m-plain.safetensors"] == Path("m-plain.safetensors").read_bytes()
    assert 'hf_hub_download("me/net", "m-plain.safetensors")' in files[CARD].decode()
    # A card that is there may be edited by hand: it stays.
    files[CARD] = b"mine"
    assert f"me/net keeps the {CARD}" in run("export", *PLAIN, "--push", "me/net").stderr
    assert files[CARD] == b"mine" and "m-plain-2.safetensors" in files
    run("export", *PLAIN, "--push", "me/net", "--force")
    assert files[CARD].startswith(b"---\n")


def test_timms_folder_goes_with_the_card_that_is_in_it(run: Run, hub: Hub, tmp_path: Path) -> None:
    arguments = {"layers": [2, 1, 1, 1], "channels": [4, 4, 8, 8]}
    network = timm.create_model("resnet18", num_classes=2, **arguments)
    save_for_hf(network, tmp_path / "source", model_args=arguments, safe_serialization=True)
    run("convert", "local-dir:source", "--input-size", 32, "-o", "m.safetensors")
    run("export", "-o", "out/", "--push", "me/net")
    files = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    assert sorted(files) == [CARD, "config.json", "model.safetensors"] and hub.files["me/net"] == files
    assert b'timm.create_model("hf-hub:me/net", pretrained=True)' in files[CARD]


def test_a_public_repository_takes_nothing_private(run: Run, model: str, hub: Hub) -> None:
    hub.create_repo("me/net", private=False, exist_ok=True)
    assert "is there already, and public" in run("export", *PLAIN, "--push", "me/net", "--private", code=1).stderr
    assert not hub.files["me/net"] and Path("m-plain.safetensors").exists()


def test_what_cannot_be_pushed_is_one_line_before_any_work(
    run: Run, model: str, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "--private goes with --push" in run("export", *PLAIN, "--private", code=2).stderr
    assert "write OWNER/NAME" in run("export", *PLAIN, "--push", "a b/c", code=2).stderr
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "needs a token" in run("export", *PLAIN, "--push", "me/net", code=1).stderr
    assert not list(Path().glob("m-*"))


def test_without_network_the_file_stays(run: Run, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.get_token", lambda: "a token")
    monkeypatch.setattr("resode_cli.sources.timm_models.getproxies", dict)
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    said = run("export", *PLAIN, "--push", "me/net", code=1).stderr
    assert "wrote m-plain.safetensors" in said and "--push me/net: the hub cannot be reached from here" in said


def test_no_file_of_the_folder_publishes(run: Run, model: str, hub: Hub) -> None:
    Path("resode.toml").write_text('model = "m.safetensors"\n[export]\npush = "me/net"\n')
    assert "push" in run("export", *PLAIN, code=2).stderr
    assert not hub.files
