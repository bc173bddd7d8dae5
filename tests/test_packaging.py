"""What a wheel holds, and the sdist that it may be made of: every module, every file beside them, every recipe."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((PROJECT / "pyproject.toml").read_text())
RECIPES = {path.name: path.read_bytes() for path in (PROJECT / "recipes").rglob("*.toml")}


def test_every_folder_of_the_package_is_named() -> None:
    found = {".".join(path.parent.relative_to(PROJECT).parts) for path in PROJECT.glob("resode_cli/**/__init__.py")}
    named = SETTINGS["tool"]["setuptools"]["packages"]
    assert sorted(found | {"resode_cli.recipes"}) == named


def built(kind: str, project: Path, to: Path) -> Path:
    """A distribution, by the build backend itself: pip would ask an index for it."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(to)!r}))"
    made = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    return to / made.stdout.splitlines()[-1]


@pytest.mark.slow
def test_wheel_and_sdist_hold_the_package_and_the_recipes(tmp_path: Path) -> None:
    try:
        present = version("setuptools")
    except PackageNotFoundError:
        pytest.skip("setuptools, which builds the wheel, is not installed")
    if int(present.partition(".")[0]) < 77:
        pytest.skip(f"setuptools {present} is older than pyproject.toml asks for")
    source = tmp_path / "source"
    leave = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*")
    for part in ("resode_cli", "recipes"):
        shutil.copytree(PROJECT / part, source / part, ignore=leave)
    for part in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PROJECT / part, source)
    files = {str(path.relative_to(source)) for path in source.glob("resode_cli/**/*") if path.is_file()}

    sdist = built("sdist", source, tmp_path)
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "sdist", filter="data")
    (unpacked,) = (tmp_path / "sdist").iterdir()
    assert {path.name: path.read_bytes() for path in (unpacked / "recipes").iterdir()} == RECIPES
    for name, project in (("direct", source), ("of the sdist", unpacked)):
        (tmp_path / name).mkdir()
        with zipfile.ZipFile(built("wheel", project, tmp_path / name)) as wheel:
            held = {member for member in wheel.namelist() if ".dist-info/" not in member}
            recipes = {f"resode_cli/recipes/{recipe}": text for recipe, text in RECIPES.items()}
            assert held == files | recipes.keys()
            assert {member: wheel.read(member) for member in recipes} == recipes
            wheel.extractall(tmp_path / name / "site")

    # A command finds them there, in whatever folder it runs.
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "direct" / "site")}
    shown = subprocess.run(
        [sys.executable, "-m", "resode_cli", "recipes", "show", "digits-pretrain"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        check=True,
    )
    assert shown.stdout == RECIPES["digits-pretrain.toml"]
