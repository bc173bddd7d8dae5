"""What `resode list` knows, found out anew: `python tests/zoo/survey.py` rewrites its table.

Networks are built on the meta device, where a forward pass computes shapes alone; those that cannot be, or
whose blocks have to be tried out, on the CPU. Takes about half an hour.
"""

from __future__ import annotations

import json
import resource
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
import torchvision
from torch import nn

from resode_cli.errors import ResodeError
from resode_cli.sources.find_stages import find_stages

TABLE = Path(__file__).parents[2] / "resode_cli" / "sources" / "catalog" / "catalog.json"


def sources() -> Iterator[str]:
    """Every architecture of timm and every classification network of torchvision."""
    yield from (f"timm:{name}" for name in timm.list_models())
    yield from (f"torchvision:{name}" for name in torchvision.models.list_models(module=torchvision.models))


def build(source: str, **arguments: int) -> nn.Module:
    library, _, name = source.partition(":")
    if library == "timm":
        return timm.create_model(name, **arguments)
    return (
        torchvision.models.get_model(name, init_weights=False) if name in INIT else torchvision.models.get_model(name)
    )


MEMORY = 20 * 2**30
SMALL = 256
INIT = ("googlenet", "inception_v3")  # these warn of their slow initialisation


def size(source: str) -> int:
    library, _, name = source.partition(":")
    if library == "timm":
        config = timm.get_pretrained_cfg(name)
        return int(config.input_size[-1]) if config else 224
    if name == "vit_h_14":  # without weights it takes smaller images than with those
        return 224
    return int(torchvision.models.get_model_weights(name).DEFAULT.transforms().crop_size[0])


def family(source: str) -> str:
    """The module that defines the architecture."""
    library, _, name = source.partition(":")
    if library == "timm":
        return timm.models._registry._model_to_module[name]
    return torchvision.models.get_model_builder(name).__module__.rpartition(".")[2]


def tags(source: str) -> list[str]:
    library, _, name = source.partition(":")
    if library == "timm":
        return [full.partition(".")[2] for full in timm.list_pretrained(f"{name}.*")]
    return [weights.name for weights in torchvision.models.get_model_weights(name)]


def row(source: str) -> dict[str, object]:
    """One row of the table; without steps, and with the reason, where the source is refused."""
    found: dict[str, object] = {"source": source, "family": family(source)}
    try:
        steps = _steps(source)
    except ResodeError as error:
        return {**found, "reason": str(error).partition(" to convert: ")[2] or str(error)}
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise
        return {**found, "reason": "not tried out: too large for the machine of the survey"}
    return {**found, "parameters": _parameters(source), "steps": steps, "tags": tags(source)}


def _parameters(source: str) -> int:
    try:
        with torch.device("meta"):
            net = build(source)
    except NotImplementedError:
        net = build(source)
    return sum(p.numel() for p in net.parameters())


def _steps(source: str) -> list[int]:
    try:
        with torch.device("meta"):
            return _found(build(source), size(source))
    except (RuntimeError, ValueError):  # NotImplementedError is one
        pass
    for arguments in ({"img_size": SMALL}, {}) if size(source) > SMALL else ():
        try:
            return _found(build(source, **arguments), SMALL)
        except (TypeError, ValueError, RuntimeError, AssertionError):  # it takes images of its own size alone
            pass
    return _found(build(source), size(source))


def _found(net: nn.Module, pixels: int) -> list[int]:
    return [len(stage.blocks) for stage in find_stages(net.eval(), torch.randn(1, 3, pixels, pixels)).stages]


def write(rows: list[dict[str, object]]) -> None:
    """The table, a row to a line."""
    versions = {"timm": timm.__version__, "torchvision": torchvision.__version__.partition("+")[0]}
    lines = ",\n".join(json.dumps(row) for row in rows)
    TABLE.write_text(f'{{"versions": {json.dumps(versions)}, "rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    rows = []
    for source in sources():
        try:
            rows.append(row(source))
        except Exception as error:
            rows.append({"source": source, "family": family(source), "reason": f"{type(error).__name__}: {error}"})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    write(rows)
