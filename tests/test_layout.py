"""The house rules: folders import downwards, no module imports itself around a corner, the numerics know no ResNet."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "resode_cli"

# From the bottom up. A file imports from its own room and from those below.
ROOMS = [
    "errors",
    "quantities",
    "options",
    "recipe",
    "machine",
    "ode",
    "network",
    "data",
    "sources",
    "surgery",
    "files",
    "simulation",
    "gradients",
    "measuring",
    "training",
    "fitting",
    "bench",
    "reports",
    "commands",
    "app",
]
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.parent != PACKAGE or path.stem not in ("__init__", "__main__")
}


def imported(module: str, *, deferred: bool = True) -> set[str]:
    """Modules of the package that a module imports at run time; deferred: inside functions too."""
    path = MODULES[module]
    package = list(path.relative_to(PACKAGE).parts[:-1])
    tree = ast.parse(path.read_text())
    typing_only = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    found = set()
    for node in ast.walk(tree) if deferred else tree.body:
        if isinstance(node, ast.ImportFrom) and node.level and node not in typing_only:
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            for alias in node.names:
                inner = ".".join([*base, alias.name])
                found.add(inner if inner in MODULES else ".".join(base))
    return found & MODULES.keys()


def test_the_list_of_rooms_is_that_of_the_package() -> None:
    assert {module.partition(".")[0] for module in MODULES} == set(ROOMS) and len(ROOMS) <= 20


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downwards(module: str) -> None:
    room = ROOMS.index(module.partition(".")[0])
    above = [name for name in imported(module) if ROOMS.index(name.partition(".")[0]) > room]
    assert not above, f"{module} imports {above} from above"


def test_no_module_imports_itself_around_a_corner() -> None:
    """Imports inside functions count: they would only hide the circle."""
    graph = {module: imported(module) - {module.rpartition(".")[0]} for module in MODULES}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the modules


@pytest.mark.parametrize("path", sorted((PACKAGE / "ode").glob("*.py")), ids=lambda p: p.name)
def test_the_numerics_know_neither_timm_nor_torchvision(path: Path) -> None:
    assert not {"timm", "torchvision"} & set(path.read_text().replace(".", " ").split())


@pytest.mark.parametrize("module", MODULES)
def test_only_commands_print_or_know_typer(module: str) -> None:
    if module.partition(".")[0] in ("commands", "app"):
        return
    tree = ast.parse(MODULES[module].read_text())
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not {"print", "typer"} & names


@pytest.mark.parametrize("module", MODULES)
def test_no_file_drifts_past_400_lines(module: str) -> None:
    assert len(MODULES[module].read_text().splitlines()) <= 400


@pytest.mark.parametrize(
    "what", ["import resode_cli", "import resode_cli.app", "import resode_cli.app; resode_cli.app.main(['--help'])"]
)
def test_importing_and_help_need_no_torch(what: str) -> None:
    code = f"{what}; import sys; sys.exit(int('torch' in sys.modules or 'timm' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_every_public_name_is_there() -> None:
    import resode_cli

    for name in resode_cli.__all__:
        assert callable(getattr(resode_cli, name)), name
