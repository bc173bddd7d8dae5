"""The house rules: imports point downwards, the numerics know no ResNet, help needs no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "resode_cli"

# From the bottom up. A module may import from its own level or one below.
LEVELS = [
    {"errors", "tables", "arguments", "signals"},
    {"atomic"},
    {"locks", "ode", "digits", "memory_budget", "catalog", "ranges"},
    {"sharing", "premises"},
    {"adjoint_choice", "compilation", "residual", "parts", "recipe", "fit_settings"},
    {"settings"},
    {"optimization"},
    {"optimizer_state"},
    {
        "adapters.reading",
        "adapters.tracing",
        "adapters.repeat",
        "adapters.watch",
        "adapters.discover",
        "adapters.cifar",
        "adapters.stems",
        "stage",
    },
    {"model"},
    {"adapters", "data", "candidates", "probe"},
    {"calibrate"},
    {"guard"},
    {"depth_weights"},
    {"model_schema", "saving"},
    {"model_file", "transfer", "recalibrate", "evaluate", "conversion"},
    {"teacher"},
    {"objective"},
    {"fit_states", "fit_results"},
    {"penalties"},
    {"fitting"},
    {
        "bench",
        "bench_worker",
        "bench_workload",
        "check_grad",
        "run_folder",
        "resuming",
        "starting",
        "finetune_results",
        "finetune",
    },
    {"comparison", "exporting", "forecast"},
    {"report_calibration"},
    {"report", "report_bench", "report_fit", "plot", "plot_bench"},
    {"commands"},
    {"app"},
]


def level(module: str) -> int:
    names = [module, module.partition(".")[0]]
    return next(i for name in names for i, group in enumerate(LEVELS) if name in group)


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports at run time, relative to the package."""
    package = list(path.relative_to(PACKAGE).with_suffix("").parts[:-1])
    tree = ast.parse(path.read_text())
    typing_only = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and node not in typing_only:
            base = package[: len(package) - node.level + 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {".".join([*base, name]) for name in names}
    return found - {"__version__", ""}


FILES = [p for p in sorted(PACKAGE.rglob("*.py")) if p.stem not in ("__init__", "__main__")]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    above = [name for name in imported(path) if level(name) > level(module)]
    assert not above, f"{module} imports {above} from above"


@pytest.mark.parametrize("path", sorted((PACKAGE / "ode").glob("*.py")), ids=lambda p: p.name)
def test_the_numerics_know_neither_timm_nor_torchvision(path: Path) -> None:
    assert not {"timm", "torchvision"} & set(path.read_text().replace(".", " ").split())


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_commands_print_or_know_typer(path: Path) -> None:
    if path.parent.name == "commands" or path.stem == "app":
        return
    tree = ast.parse(path.read_text())
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not {"print", "typer"} & names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_file_drifts_past_400_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


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
