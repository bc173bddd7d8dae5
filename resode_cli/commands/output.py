"""Where a command's words go: results to standard output, everything else to standard error.

With --json, standard output carries one JSON document and nothing else.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console, RenderableType
from rich.text import Text

from ..errors import printable


class _Console(Console):
    """One that takes a text as it is: file names, class names and what a model file says are not to be trusted."""

    def render_str(self, text: str, **settings: Any) -> Text:
        return super().render_str(printable(text), **settings)


def _console(*, stderr: bool) -> Console:
    file: Any = _Lasting() if stderr else None
    console = _Console(stderr=stderr, file=file, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 120  # a file or a pipe has no width of its own
    return console


class _Lasting:
    """Standard error, whose reader may go, with a terminal or a pipe, without ending the work."""

    @property
    def rich_proxied_file(self) -> _Lasting:  # a progress bar asks whom a file stands for
        return self

    @property
    def _file(self) -> Any:
        return getattr(sys.stderr, "rich_proxied_file", sys.stderr)

    def write(self, text: str) -> int:
        try:
            return int(self._file.write(text))
        except OSError:
            return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class Output:
    """quiet: of a process beside the one that speaks, say nothing."""

    def __init__(self, *, json_mode: bool, quiet: bool = False) -> None:
        self.json_mode = json_mode and not quiet
        self.aside = _console(stderr=True)
        self.aside.quiet = quiet
        self.said: set[str] = set()
        self.main = self.aside if json_mode or quiet else _console(stderr=False)

    def show(self, what: RenderableType, *, style: str | None = None) -> None:
        """A result, for people."""
        # A terminal wraps text itself, so that a command or a path can be copied whole; tables fit its width.
        self.main.print(what, style=style, soft_wrap=isinstance(what, str) or not self.main.is_terminal)

    def note(self, text: str) -> None:
        """A remark: standard error always."""
        self.aside.print(text, soft_wrap=True)

    def notes(self, texts: Iterable[str | None]) -> None:
        """Remarks, each once however often it comes: two splits may have the same to say."""
        for text in texts:
            if text is not None and text not in self.said:
                self.said.add(text)
                self.note(text)

    def json(self, document: dict[str, Any] | list[Any]) -> None:
        """The result, for programs, where --json asks for it."""
        for collected in _collecting:
            collected.append(document)
        if self.json_mode:
            print(json.dumps(document, indent=2, allow_nan=False))


_collecting: list[list[Any]] = []


@contextmanager
def collecting() -> Iterator[list[Any]]:
    """The results, for programs, of the commands that are run inside the block."""
    documents: list[Any] = []
    _collecting.append(documents)
    try:
        yield documents
    finally:
        _collecting.remove(documents)


def start() -> None:
    """What every command that computes does first."""
    import torch

    # Reconstructed states of dead channels decay into denormal numbers, which a CPU computes a
    # hundred times more slowly. Threads started from here on inherit the setting.
    torch.set_flush_denormal(True)
