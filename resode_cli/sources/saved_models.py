"""Networks that timm saved: `hf-hub:REPO`, on the Hugging Face hub, and `local-dir:FOLDER`.

Both hold a config.json, which names the architecture, and weights. A converted network keeps the architecture
and its arguments, and needs neither hub nor folder again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import ResodeError, UsageError

LONGEST = 1_000  # characters of a class name
WEIGHTS = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class SavedModel:
    """arguments: of the architecture's function. config: timm's pretrained_cfg. weights: the file, of a folder.

    names: of its classes, in the order of its outputs; None where it has none that can be. multi_label: whether an
    image may have several of them, as resode writes it into a folder.
    """

    architecture: str
    config: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    weights: Path | None = None
    names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    multi_label: bool = False

    @property
    def classes(self) -> int | None:
        return self.config.get("num_classes")


def read_folder(name: str) -> SavedModel:
    """Raises UsageError for a folder that does not exist, ResodeError for one without a config.json that can be."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise UsageError(f"folder {name!r} does not exist")
    try:
        raw = json.loads((folder / "config.json").read_text())
        config = {**raw.get("pretrained_cfg", {})}
        config |= {name: raw[name] for name in ("num_classes", "label_names") if name in raw}
        several = raw.get("multi_label") is True
        saved = SavedModel(str(raw["architecture"]), config, dict(raw.get("model_args") or {}), multi_label=several)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ResodeError(f"{folder}: no config.json of timm's in it ({type(error).__name__}: {error})") from error
    weights = next((folder / file for file in WEIGHTS if (folder / file).is_file()), None)
    return _checked(replace(saved, weights=weights), str(folder / "config.json"))


def read_hub(name: str) -> SavedModel:
    """The config alone is downloaded."""
    from timm.models import load_model_config_from_hf

    from .timm_models import offline_if_unreachable

    with offline_if_unreachable():
        config, architecture, arguments = load_model_config_from_hf(name)
    return _checked(SavedModel(architecture, dict(config), dict(arguments or {})), f"hf-hub:{name}")


def _checked(saved: SavedModel, where: str) -> SavedModel:
    """What is said of images, classes and layers, and nothing of where weights are to come from."""
    from .timm_arguments import check, check_preprocessing

    config = check_preprocessing(saved.config, where)
    names, notes = _class_names(saved.config.get("label_names"), config.get("num_classes"))
    return replace(saved, config=config, arguments=check(saved.arguments, saved.architecture), names=names, notes=notes)


def _class_names(given: Any, classes: int | None) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """timm's label_names, a list or a table by the output's number, and what to say of such as cannot be."""
    if not given:
        return None, ()
    names = given
    if isinstance(given, dict):
        numbers = {str(key): name for key, name in given.items()}
        names = [numbers.get(str(place)) for place in range(len(numbers))]
    if not isinstance(names, list | tuple) or not all(isinstance(n, str) and 0 < len(n) <= LONGEST for n in names):
        problem = "are no list of names"
    elif len(names) != classes:
        problem = f"are {len(names)} names of {classes} classes"
    elif len(set(names)) < len(names):
        problem = "name two classes alike"
    else:
        return tuple(names), ()
    return None, (f"its label_names {problem}: its classes are taken without names",)
