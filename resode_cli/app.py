"""The `resode` command. A user's mistake becomes one readable line and an exit code."""

from __future__ import annotations

import re
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Annotated, Any

import typer
import typer.core
import typer.main

from . import __version__
from .commands import (
    bench,
    check_grad,
    completion,
    convert,
    deepen,
    demo,
    evaluate,
    export,
    finetune,
    info,
    list_sources,
    predict,
    recalibrate,
    recipes,
    report,
    tie,
    untie,
)
from .commands.interrupt import leave_closed_terminal, listening, send_nowhere, stop
from .commands.options import RECIPE
from .commands.working_folder import Command
from .errors import ResodeError, ResodeWarning, UsageError, printable
from .machine.processes import EndedElsewhere, what_to_say
from .machine.signals import Stopped, exit_code


class _Interrupted(ResodeError):
    def __init__(self, number: int) -> None:
        super().__init__("interrupted")
        self.exit_code = exit_code(number)


def _interrupted(error: KeyboardInterrupt) -> _Interrupted:
    if isinstance(error, Stopped):
        error.heeded = True
    return _Interrupted(stop.number or signal.SIGINT)


class _Commands(typer.core.TyperGroup):
    """Two things that only the command's own context knows, before typer lets go of it.

    Ctrl-C becomes an error of ours, where typer would make an exit without a word of it; and a mistake in what a
    recipe says names the recipe.
    """

    def make_context(self, *arguments: Any, **settings: Any) -> Any:
        try:
            return super().make_context(*arguments, **settings)
        except KeyboardInterrupt as error:
            raise _interrupted(error) from error

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise _interrupted(error) from error
        except EOFError as error:  # of which typer would make an exit without a word, too
            raise ResodeError("a process or a file that was being read ended before its time") from error
        except UsageError as error:
            recipe, settings = ctx.meta.get(RECIPE, ("", {}))
            if not any(_names(str(error), name, value) for name, value in settings.items()):
                raise
            raise type(error)(f"recipe {recipe}: {error}") from error


def _names(message: str, setting: str, value: object) -> bool:
    """Whether a message is about what a recipe sets."""
    flag = f"--{setting.replace('_', '-')}"
    return re.search(rf"{flag}(?![\w-])", message) is not None or (isinstance(value, str) and repr(value) in message)


app = typer.Typer(
    name="resode",
    cls=_Commands,
    help="Pretrained ResNets as ODEs: convert, deepen, fine-tune without storing activations, check the gradients.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Add --debug to any command to see the traceback of an error.",
)

app.command("list", cls=Command)(list_sources.list_command)
app.command("convert", cls=Command)(convert.convert_command)
app.command("info", cls=Command)(info.info_command)
app.command("tie", cls=Command)(tie.tie_command)
app.command("untie", cls=Command)(untie.untie_command)
app.command("deepen", cls=Command)(deepen.deepen_command)
app.command("recalibrate", cls=Command)(recalibrate.recalibrate_command)
app.command("check-grad", cls=Command)(check_grad.check_grad_command)
app.command("bench", cls=Command)(bench.bench_command)
app.command("finetune", cls=Command)(finetune.finetune_command)
app.command("eval", cls=Command)(evaluate.eval_command)
app.command("predict", cls=Command)(predict.predict_command)
app.command("report", cls=Command)(report.report_command)
app.command("export", cls=Command)(export.export_command)
app.command("demo", cls=Command)(demo.demo_command)
app.add_typer(recipes.commands, name="recipes")


def _print_version(value: bool) -> None:
    if value:
        print(f"resode {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


@cache
def _commands() -> Any:
    """Every command with its options, once for a process: Python that calls `main` again need not wait for them."""
    return typer.main.get_command(app)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1, 2 for usage; 130, 143 or 129 for a signal that ended it."""
    if completion.asked():
        return completion.answer(lambda: app([], prog_name="resode", standalone_mode=False))
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    try:
        with listening():
            return _run(arguments, debug=debug)
    except KeyboardInterrupt as error:  # before a command began, or after it ended
        _say("error: interrupted")
        return exit_code(error.number if isinstance(error, Stopped) else signal.SIGINT)


def _run(arguments: list[str], *, debug: bool) -> int:
    failure: BaseException
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that knows ASCII alone shows what it can
    try:
        with _warnings_in_a_line():
            result = _commands().main(arguments, prog_name="resode", standalone_mode=False)
        return _ended(result if isinstance(result, int) else 0, "")
    except ResodeError as error:
        failure, code = error, error.exit_code
        message = str(error)
    except BrokenPipeError:
        # Whoever read our output has gone: nothing to say, and nobody to say it to.
        send_nowhere(1)
        return 1 if stop.number is None else exit_code(stop.number)
    except Exception as error:
        failure = error
        # Whatever a signal ran into, such as a library halfway through its import, it is the signal that ended it.
        code, message = _explain(error) if stop.number is None else (exit_code(stop.number), "interrupted")
    leave_closed_terminal()
    if not message:  # no arguments: the help has been printed
        return code
    if debug:
        traceback.print_exception(failure)
    return _ended(code, message, elsewhere=isinstance(failure, EndedElsewhere))


def _ended(code: int, message: str, *, elsewhere: bool = False) -> int:
    """Say what went wrong, if it is on this process to say it. Returns the exit code."""
    message = what_to_say(message, elsewhere=elsewhere)
    if message:
        _say(f"error: {' '.join(message.split())}")
    return code or int(bool(message))


def _say(line: str) -> None:
    with suppress(OSError):  # whoever read it has gone
        print(printable(line), file=sys.stderr)


@contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """Warnings of this package, as a user reads them; those of others as Python shows them."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", ResodeWarning)
        otherwise = warnings.showwarning

        def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, ResodeWarning):
                _say(f"warning: {' '.join(str(message).split())}")
            else:
                otherwise(message, category, *where, **more)

        warnings.showwarning = show
        yield


# As CUDA and the allocator of the CPU say it.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def _explain(error: Exception) -> tuple[int, str]:
    """Exit code and line for an error that is not ours."""
    if type(error).__name__ == "NoArgsIsHelpError":
        return 2, ""
    # Click's errors, by what they offer: typer brings its own copy of Click from some version on.
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):
        context = getattr(error, "ctx", None)
        where = f"; see `{context.command_path} --help`" if context is not None else ""
        return error.exit_code, f"{error.format_message().rstrip('.')}{where}"
    if "DataLoader worker" in str(error):
        return 1, "a process that reads images died, perhaps for want of memory; fewer --workers take less of it"
    if isinstance(error, MemoryError) or any(words in str(error).lower() for words in _OUT_OF_MEMORY):
        return 1, "out of memory; try a smaller --batch-size, or --adjoint pc, which holds no activations of a stage"
    if "Expected more than 1 value per channel when training" in str(error):
        return 1, (
            "a BatchNorm layer has one value per channel, of which there is no variance: raise --batch-size (the last"
            " batch of an epoch may hold one image), or take --bn frozen"
        )
    if isinstance(error, OSError):
        return 1, f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
    return 1, f"unexpected {type(error).__name__}: {error} (--debug shows where; please report it)"
