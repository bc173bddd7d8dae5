"""Files that are there whole or not at all: written beside their place, then put into it."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import ResodeError, UsageError
from ..quantities import size

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Writers in other languages pass the system's words on, and torch's says only that it failed.
_FULL_WORDS = ("no space left", "os error 28", "os error 27", "disk quota", "file too large", "pytorchstreamwriter")


def check_output(path: Path, *, force: bool, folder: bool = False) -> None:
    """Refuse, before any work is done, an output that exists or cannot be written.

    folder: it is to be one, of files that take the places of others with `force`.
    """
    if folder and path.is_dir():
        if any(path.iterdir()) and not force:
            raise ResodeError(f"{path} exists, with files in it; pass --force to overwrite those of the same names")
        return
    if folder and path.exists():
        raise UsageError(f"output {str(path)!r} is a file; name a folder")
    if path.is_dir():
        raise UsageError(f"output {str(path)!r} is a folder; name a file")
    if path.exists() and not force:
        raise ResodeError(f"{path} exists; pass --force to overwrite it")
    if path.is_symlink() and not path.exists():
        raise UsageError(f"output {str(path)!r} is a link to {str(path.readlink())!r}, which does not exist")
    if not path.parent.is_dir():
        raise UsageError(f"output folder {str(path.parent)!r} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise ResodeError(f"output folder {str(path.parent)!r} cannot be written to")


@contextmanager
def atomic_path(path: Path, *, need: int | None = None) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well, and is removed when not.

    Both the file and the folder's entry are on the disk before the block is left, so that not even a power cut
    leaves half a file under the name. need: bytes that will be written, for the message of a full disk.

    Raises ResodeError, with what is needed and what is free, where the disk is full.
    """
    path = path.resolve()  # through a link, the file that it means is written
    remove_orphans(path)
    with clear_errors(path, need):
        handle, name = tempfile.mkstemp(prefix=_prefix(path), suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            temporary.chmod(_mode())
            _flush(temporary)
            os.replace(temporary, path)
            _flush(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, whose files are in `path` when the block ends well, and is removed when not.

    A folder that is there keeps its other files.
    """
    path = path.resolve()
    remove_orphans(path)
    with clear_errors(path, None):
        temporary = Path(tempfile.mkdtemp(prefix=_prefix(path), suffix=".tmp", dir=path.parent))
        try:
            yield temporary
            for file in temporary.iterdir():
                file.chmod(_mode())
                _flush(file)
            if path.is_dir():
                for file in temporary.iterdir():
                    os.replace(file, path / file.name)
                _flush(path)
            else:
                temporary.chmod(_mode(0o777))
                os.replace(temporary, path)
            _flush(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _prefix(path: Path) -> str:
    """The writer's host and process stand in it: what a killed process left can be told from what is written."""
    return f".{path.name}.{_host()}-{os.getpid()}."


def _mode(most: int = 0o666) -> int:
    """The permissions that the user gives to new files."""
    umask = os.umask(0)
    os.umask(umask)
    return most & ~umask


def remove_orphans(path: Path) -> None:
    """Remove what processes of this host that are no more have left of `path`."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.{re.escape(_host())}-(\d+)\..*\.tmp")
    try:
        names = os.listdir(path.parent)
    except OSError:
        return
    for name in names:
        found = pattern.fullmatch(name)
        if found and not is_alive(int(found[1])):
            orphan = path.parent / name
            if orphan.is_dir():
                shutil.rmtree(orphan, ignore_errors=True)
            else:
                orphan.unlink(missing_ok=True)


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9]", "_", socket.gethostname())


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # it is somebody else's
    return True


def _flush(path: Path) -> None:
    """Bring a file, or the entries of a folder, to the disk."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return  # some systems do not open folders
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # some file systems have no such thing
            raise
    finally:
        os.close(handle)


@contextmanager
def clear_errors(path: Path, need: int | None) -> Iterator[None]:
    """Raises ResodeError, by the file's name, for what keeps it from being written inside the block."""
    try:
        yield
    except ResodeError:
        raise
    except Exception as error:
        if is_full(error):
            raise ResodeError(full_disk(path, need)) from error
        if isinstance(error, OSError):
            raise ResodeError(f"{path} cannot be written: {error.strerror or error}") from error
        raise


def is_full(error: Exception) -> bool:
    """Whether an error says that there was no room for a file."""
    words = str(error).lower()
    return getattr(error, "errno", None) in _FULL or any(word in words for word in _FULL_WORDS)


def full_disk(path: Path, need: int | None) -> str:
    """The message of a full disk: the file, what it needs, and what is free."""
    needs = f"it needs {size(need)}, and " if need is not None else ""
    try:
        free = f"{needs}{size(shutil.disk_usage(path.parent).free)} are free"
    except OSError:
        free = f"{needs}no more can be written"
    return f"{path} cannot be written: no room on the disk ({free}; what stood there before is untouched)"
