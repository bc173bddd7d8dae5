"""Options that several commands share."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

import typer

from ..errors import UsageError, join
from ..options import flag_of, option, workers_option
from ..quantities import COUNT, COUNT_OR_NONE, LONGEST_STAGE, SHARES, Range
from ..recipe import choose, read_recipe
from .completion import data as complete_data
from .completion import devices, models, recipes, stages
from .output import Output

if TYPE_CHECKING:
    from ..data import HoldOut, ImageData
    from ..data.splits import Split
    from ..network.model import OdeResNet
    from .parameters import Given


def fill_from_recipe(ctx: typer.Context, value: Path | None) -> Path | None:
    """Let a recipe supply defaults: flags win wherever they stand, and values are checked as flags are."""
    if value is None or ctx.resilient_parsing:  # a shell that completes a line wants no word of ours
        return value
    recipe = choose(value)
    names = [p.name for p in ctx.command.params if p.name not in (None, *NOT_OF_A_RECIPE)]
    settings = read_recipe(recipe, ctx.info_name or "", [name for name in names if name])
    settings = settings_of(ctx.command, settings, f"recipe {recipe.name}")
    if recipe.note is not None:
        Output(json_mode=False).note(recipe.note)
    ctx.default_map = {**(ctx.default_map or {}), **settings}
    ctx.meta[RECIPE] = (recipe.name, settings)
    return recipe.path


def settings_of(command: Any, table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values of a TOML table as a command's parameters take them. where: what messages call the file.

    Raises UsageError for a value of another type, and for code to run.
    """
    kinds = get_type_hints(command.callback)
    settings = {}
    for name, given in table.items():
        if name in MAY_BE_CODE and is_code(given):
            raise UsageError(
                f"{where}: {name} = {given!r}: a recipe must not name code to run;"
                " name it on the command line, and leave it out there"
            )
        settings[name] = as_kind(kinds[name], given, f"{where}: {name.replace('_', '-')}")
    return settings


NOT_OF_A_RECIPE = ("recipe", "help", "resume", "trust_source")  # what is asked for in the very command, or not at all
MAY_BE_CODE = ("source", "model")  # parameters that FILE.py:FUNCTION suits
RECIPE = "resode recipe"  # in a context's meta: a recipe's name, and its settings by parameter


def is_code(value: object) -> bool:
    """Whether a value is a FILE.py:FUNCTION, which runs when a network is built by it."""
    return isinstance(value, str) and value.rpartition(":")[0].endswith(".py")


def as_kind(kind: Any, value: object, what: str) -> object:
    """A value of a TOML file as an option of some type takes it.

    Raises UsageError where they differ: Click would make a rate of 1.0 of `true`, and 1 of 1.9.
    """
    kinds = set(get_args(kind)) - {NoneType} or {kind}
    if kinds == {list[str]}:
        parts = value if isinstance(value, list) else [value]
        return [as_kind(str, part, what) for part in parts]
    if isinstance(value, bool):
        fits = bool in kinds
    elif isinstance(value, int):
        fits = bool(kinds & {int, float, str})
    elif isinstance(value, float):
        fits = bool(kinds & {float, str})
    else:
        fits = isinstance(value, str) and bool(kinds & {str, Path})
    if not fits:
        shown = str(value).lower() if isinstance(value, bool) else repr(value)
        raise UsageError(f"{what} = {shown}: write {join([_KINDS[k] for k in _KINDS if k in kinds], 'or')}")
    return str(value) if str in kinds else value


_KINDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text in quotes",
    Path: "a path in quotes",
}


def number(*flags: str, range: Range, help: str, group: str | None = None) -> Any:
    """An option that takes the numbers of a range. Typer's own min and max let NaN and infinity through."""

    def check(value: float | None) -> float | None:
        range.check(flags[0], value)
        return value

    return typer.Option(
        *flags, help=f"{help} ({range.words})" if range.words else help, callback=check, rich_help_panel=group
    )


DATA, MACHINE = "Data", "Machine"  # headings in a command's help

# Typer reads annotations at run time and needs the names they use.
ModelArgument = Annotated[
    Path, typer.Argument(help="Model file, as written by `resode convert`.", autocompletion=models)
]
OutputOption = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        help="Model file to write (.safetensors). Default: a new one here, named after its origin.",
    ),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Overwrite the output if it exists.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
RecipeOption = Annotated[
    Path | None,
    typer.Option(
        "--recipe",
        help="TOML file with defaults for these options, or the name of one that comes with resode (`resode recipes`).",
        is_eager=True,
        callback=fill_from_recipe,
        autocompletion=recipes,
    ),
]
DATA_OPTION = typer.Option(
    "--data",
    "-d",
    help="'digits', a torchvision name (cifar10, …), a folder with one for each class (see --val-split), one with"
    " train and test (or val), a .csv or .tsv with columns path and label, and perhaps split (several labels: cat|dog,"
    " or a 0/1 column for each class), WebDataset's .tar shards (a folder of them, or 'wds:train-{000..009}.tar'), or"
    " hf:NAME (hf:FOLDER) for a data set of Hugging Face.",
    rich_help_panel=DATA,
    autocompletion=complete_data,
)
DataOption = Annotated[str, DATA_OPTION]
BatchSizeOption = Annotated[int, number("--batch-size", "-b", range=COUNT, help="Images per batch.", group=DATA)]
DeviceOption = Annotated[
    str,
    typer.Option(
        "--device", help="'auto', 'cpu', 'cuda', 'cuda:1', …", rich_help_panel=MACHINE, autocompletion=devices
    ),
]
StageOption = Annotated[
    list[str] | None,
    typer.Option(
        "--stage",
        help="Stages, by name (layer3) or place (3), comma-separated or given again. Default: all.",
        autocompletion=stages,
    ),
]


@dataclass(frozen=True)
class Origin:
    """How the network of a model file is built, where code of the user's own built it."""

    source: str | None = option(
        None,
        "FILE.py:FUNCTION that builds the network, where a file of one's own made it.",
        group="Model file",
    )
    trust_source: bool = option(False, "Run the FILE.py that the model file names: it is code.", group="Model file")

    def load(self, path: Path) -> OdeResNet:
        """The model of a file."""
        from ..files import model_file

        return model_file.load(path, source=self.source, trust_source=self.trust_source)


OF_DATA = ("val_split", "split_seed", "class_map")  # of `Reading`: what is said of data


@dataclass(frozen=True)
class Reading:
    """Which images are read, and how."""

    images: int | None = option(None, "Use this many images, evenly spaced.", range=COUNT, group=DATA)
    skip_corrupt: bool = option(False, "Leave unreadable images out, counting them.", group=DATA)
    data_root: Path = option(Path("~/.cache/resode"), "Where torchvision data sets are kept.", group=DATA)
    val_split: float | None = option(
        None,
        "Share of each class that is held out of training as val, where there is no val. Default: 0.2 where there are"
        " no splits at all, or as the model was trained.",
        range=SHARES,
        group=DATA,
    )
    split_seed: int | None = option(
        None,
        "Which images --val-split holds out. Default: 0, or as the model was trained.",
        range=COUNT_OR_NONE,
        group=DATA,
    )

    class_map: Path | None = option(
        None,
        "Other names for classes: a CSV or TSV (class, name), JSON, or a text file with a name a line, in order.",
        group=DATA,
    )

    def check_used(self, data: str | None, fit: str | None = None) -> None:
        """Raises UsageError for what says something of the data where there are none. fit: data without labels."""
        for setting in fields(self):
            used = data is not None or (fit is not None and setting.name != "class_map")
            if setting.name in OF_DATA and not used and getattr(self, setting.name) is not None:
                raise UsageError(f"{flag_of(setting)} says something of --data; add --data")

    def hold_out(self, model: OdeResNet) -> HoldOut:
        """What is held out of training for a model, where the data have no split for that."""
        from ..data import HoldOut, known_division

        return HoldOut(self.val_split, self.split_seed, known_division(model.info.history))

    def open(self, data: str, model: OdeResNet, split: Split, **more: Any) -> ImageData:
        """Labelled images for a model."""
        from ..data import open_labelled

        chosen = self._chosen(model)  # which may give the model's classes other names
        return open_labelled(data, model.info, split, **{**chosen, **more})

    def open_as_it_is(self, data: str, model: OdeResNet, split: Split, **more: Any) -> ImageData:
        """The same with the data's own classes, whatever the model's are."""
        from ..data import known_division, open_data

        known = known_division(model.info.history)
        return open_data(data, model.info.preprocessing, split, known=known, **{**self._chosen(model), **more})

    def _chosen(self, model: OdeResNet) -> dict[str, Any]:
        from ..data.class_map import read_class_map

        class_map = None if self.class_map is None else read_class_map(self.class_map)
        if class_map is not None:
            name_outputs(model, self.class_map)
        return {
            "images": self.images,
            "skip_corrupt": self.skip_corrupt,
            "root": self.data_root,
            "val_split": self.val_split,
            "split_seed": self.split_seed,
            "class_map": class_map,
        }


@dataclass(frozen=True)
class Readers:
    """Who reads images."""

    workers: int | str = workers_option()


def name_outputs(model: OdeResNet, path: Path | None) -> None:
    """Call a model's classes as a class map says, where there is one."""
    if path is None:
        return
    from ..data.class_map import read_class_map

    names = read_class_map(path).of_outputs(model.info.class_names, model.info.num_classes)
    if names is not None:
        model.name_classes(names)


@dataclass(frozen=True)
class Comparing:
    """On what a rewritten network is compared with what it was."""

    data: str | None = option(
        None,
        "Data on which to measure accuracy before and after (test split).",
        flags=("--data", "-d"),
        group=DATA,
    )
    batch_size: int = option(100, "Images per batch.", range=COUNT, flags=("--batch-size", "-b"), group=DATA)
    device: str = option("auto", "'auto', 'cpu', 'cuda', 'cuda:1', …", group=MACHINE)
    workers: int | str = workers_option()
    gradients: bool | None = option(
        None,
        "Report the gradient errors of reversals, before and after. Default: where there is a fit.",
        flags=("--gradients",),
        off="--no-gradients",
    )


def check_auto(given: Given, *, chooses: bool, sizes: bool = False) -> None:
    """Raises UsageError for a flag that only `auto` reads where nothing is chosen. A recipe's value is no flag.

    sizes: whether a batch is made to fit into the budget.
    """
    for name, read in (("grad_tol", chooses), ("memory_budget", chooses or sizes)):
        if name in given.flags and not read:
            raise UsageError(
                f"--{name.replace('_', '-')} is for methods that are chosen: --adjoint auto, or --anchors auto"
            )


def depth_list(flag: str, text: str, *, at_least: int = 1) -> list[int]:
    """Depths of stages, in order, from a comma-separated list of them. Raises UsageError for anything else."""
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = []
    if len(found) < at_least or found[0] < 1 or found[-1] > LONGEST_STAGE:
        raise UsageError(
            f"{flag} {text!r}: write {'two' if at_least == 2 else 'one'} or more depths of 1 to {LONGEST_STAGE} steps,"
            " as in 16,64"
        )
    return found


HorizonOption = Annotated[
    str | None,
    typer.Option(
        "--horizon",
        help="The time T that every stage runs over, in steps of T/N: 1 for training from scratch, as in the paper."
        " Another T than the present one is another function. Default: it stays; a source's is its number of blocks.",
    ),
]


def check_writable(flag: str, path: Path) -> None:
    """Raises UsageError, before any work is done, for a file that cannot be written."""
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UsageError(f"{flag} {str(path)!r}: not a file in a folder that exists and can be written to")


def check_safetensors(path: Path) -> Path:
    """Raises UsageError for an output whose name would say it is something else."""
    if path.suffix != ".safetensors":
        raise UsageError(f"output {str(path)!r}: model files end in .safetensors")
    return path
