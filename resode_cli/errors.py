"""What went wrong, in the user's words: one line that says what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class ResodeError(Exception):
    """A mistake or a limit the user can act on. Printed as one line; exit code 1."""

    exit_code = 1


class UsageError(ResodeError):
    """A command line, recipe or argument that cannot be meant as given. Exit code 2."""

    exit_code = 2


class ResodeWarning(UserWarning):
    """What a user should know of, though the work goes on. The command line prints it as one line."""


class NonFiniteWarning(ResodeWarning):
    """A model with weights that are no numbers, which gives none either."""


def printable(text: str) -> str:
    """Text of unknown origin as it may reach a terminal: what would move its cursor, colour it or hide is escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def one_line(text: str) -> str:
    """The same where a line of ours goes on after it: a line feed in a file's text would begin another."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def unknown(what: str, given: str, allowed: Iterable[str], *, named_by: str | None = None) -> UsageError:
    """The error for a name that is not one of `allowed`: what was given, what is allowed, the nearest match.

    named_by: what names the allowed ones, in place of their list.
    """
    names = list(allowed)
    message = f"unknown {what} {given!r}"
    nearest = difflib.get_close_matches(given, names, n=4, cutoff=0.5)
    if nearest:
        message += f"; did you mean {join(nearest, 'or')}?"
    if named_by is not None:
        message += f" ({named_by})"
    elif len(names) <= 12:
        message += f" (allowed: {', '.join(names)})"
    return UsageError(message)


def join(words: Sequence[str], conjunction: str = "and") -> str:
    """'a, b and c'."""
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} {conjunction} {words[-1]}"


def first_few(names: Sequence[str], limit: int = 3) -> str:
    """The first names of a list, and how many more there are."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
