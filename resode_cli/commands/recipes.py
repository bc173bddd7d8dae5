"""`resode recipes`: the recipes that come with resode."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ResodeError, UsageError
from ..machine.atomic import atomic_path, check_output
from ..recipe import describe, packaged, packaged_file
from ..reports.tables import plain_table
from .options import ForceOption, JsonOption
from .output import Output

commands = typer.Typer(help="List, print or copy the recipes that come with resode.", no_args_is_help=False)
NameArgument = Annotated[
    str,
    typer.Argument(
        help="Name of a recipe, as `resode recipes list` has it.",
        autocompletion=lambda incomplete: [name for name in packaged() if name.startswith(incomplete)],
    ),
]


@commands.callback(invoke_without_command=True)
def recipes_command(ctx: typer.Context, json: JsonOption = False) -> None:
    """List, print or copy the recipes that come with resode. Without a word more, it lists them."""
    if ctx.invoked_subcommand is None:
        list_command(json=json)
    elif json:
        raise UsageError("--json is of the list: resode recipes list --json")


@commands.command("list")
def list_command(*, json: JsonOption = False) -> None:
    """List the recipes: name, the commands that each has settings for, and what it is."""
    found = [describe(name, path) for name, path in packaged().items()]
    if not found:
        raise ResodeError("this installation of resode has no recipes: install it anew")
    output = Output(json_mode=json)
    table = plain_table("recipes that come with resode")
    table.add_column("name", no_wrap=True)
    table.add_column("commands")
    table.add_column("what it is")
    for recipe in found:
        table.add_row(recipe.name, ", ".join(recipe.commands), recipe.about)
    output.show(table)
    output.show("`--recipe NAME` uses one, `resode recipes show NAME` prints it, `resode recipes copy NAME` copies it")
    output.json([asdict(recipe) for recipe in found])


@commands.command("show")
def show_command(*, name: NameArgument) -> None:
    """Print a recipe as it is: its settings, and in its header the commands and what was measured."""
    text = packaged_file(name).read_text(encoding="utf-8")
    Output(json_mode=False).show(text.removesuffix("\n"))


@commands.command("copy")
def copy_command(
    *,
    name: NameArgument,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File to write. Default: NAME.toml in this folder.")
    ] = None,
    force: ForceOption = False,
) -> None:
    """Copy a recipe, to change it: `--recipe NAME` then means the copy in this folder."""
    text = packaged_file(name).read_bytes()
    out = Path(f"{name}.toml") if out is None else out
    check_output(out, force=force)
    with atomic_path(out) as temporary:
        temporary.write_bytes(text)
    Output(json_mode=False).note(f"wrote {out}")
