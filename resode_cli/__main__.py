"""`resode`, and `python -m resode_cli`."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any, NoReturn

from .machine.signals import SIGNALS, exit_code


def _end(number: int, _: Any) -> NoReturn:
    """Nothing is begun yet, or all is done: there is nothing to leave in order."""
    try:
        os.write(2, b"error: interrupted\n")
    finally:
        os._exit(exit_code(number))


def run() -> None:
    """Run the command line, and exit with its code. Signals are one line from the first import on."""
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _end)
    from .app import main
    from .machine.processes import leave as leave_other_processes

    code = main()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # the work is done, and its code known
    leave_other_processes(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
