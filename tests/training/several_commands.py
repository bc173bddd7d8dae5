"""Commands of two processes each, as torchrun would start them, but forked: importing torch takes longest.

python several_commands.py FILE

FILE: a JSON list of command lines, of which one process runs the first, so that all is imported. What each process said
of the others, and its exit code, goes to stdout as JSON.
"""

from __future__ import annotations

import io
import json
import os
import socket
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch.nn.parallel import DistributedDataParallel  # noqa: F401  imported once for all

import resode_cli.training.finetune  # noqa: F401
from resode_cli.app import main
from resode_cli.machine.processes import leave

COUNT = 2


def _child(place: int, port: int, arguments: list[str], said: Any) -> None:
    os.dup2(said.fileno(), 1)
    os.dup2(said.fileno(), 2)
    found = {"WORLD_SIZE": COUNT, "LOCAL_WORLD_SIZE": COUNT, "RANK": place, "LOCAL_RANK": place, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in found.items()}, MASTER_ADDR="localhost")
    code = main(arguments)
    leave(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def together(arguments: list[str]) -> dict[str, Any]:
    """What the processes of one command said, and their exit codes."""
    with socket.socket() as server:
        server.bind(("localhost", 0))
        port = int(server.getsockname()[1])
    files = [tempfile.TemporaryFile("w+") for _ in range(COUNT)]  # noqa: SIM115  closed below
    begun = []
    for place, said in enumerate(files):
        child = os.fork()
        if not child:
            try:
                _child(place, port, arguments, said)
            finally:
                os._exit(99)
        begun.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in begun]
    texts = []
    for said in files:
        said.seek(0)
        texts.append(said.read())
        said.close()
    return {"said": texts, "codes": codes}


def all_of(commands: list[list[str]]) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        assert main(commands[0]) == 0
    found = []
    for command in commands[1:]:
        if command[0] == "rm":
            Path(command[1]).unlink()
        else:
            found.append(together(command))
    return found


if __name__ == "__main__":
    print(json.dumps(all_of(json.loads(Path(sys.argv[1]).read_text()))))
