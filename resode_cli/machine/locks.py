"""One writer at a time: a lock on a file that says who holds it.

The kernel keeps the lock with the open file, so it ends with the process, however that ends: a lock file that was
left behind never blocks.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from ..errors import ResodeError, UsageError
from .atomic import is_alive

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None  # type: ignore[assignment]

UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class Locked(ResodeError):
    """Somebody else holds the lock."""


class Lock:
    """Held inside a `with` block, or between `acquire` and `release`.

    path: the lock file. subject: what it stands for, in an error. on_message gets a remark where the file system has
    no locks; the block then runs without one.
    Raises Locked where another process holds it, UsageError where the folder cannot be made or written to.
    """

    def __init__(self, path: Path, subject: str, *, on_message: Callable[[str], None] = lambda message: None) -> None:
        self.path, self.subject, self.on_message = path, subject, on_message
        self.descriptor: int | None = None
        self.made: list[Path] = []  # folders that were not there before, the innermost first

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()

    def acquire(self) -> None:
        if fcntl is None:
            self.on_message(f"no file locks here: nothing keeps a second process out of {self.subject}")
            return
        try:
            self._make_folder()
            while self.descriptor is None:
                self.descriptor = self._try()
        except BaseException:
            self._remove_folders()
            raise

    def _try(self) -> int | None:
        """The open file, locked. None if its holder removed it meanwhile, so that it locks nothing."""
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise UsageError(f"{self.path.parent} cannot be written to: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not self._is(descriptor):
                os.close(descriptor)
                return None
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            return descriptor
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            os.close(descriptor)
            who = holder if holder.isprintable() and holder else "another process"
            raise Locked(f"{who} is writing to {self.subject}; wait for it, end it, or choose another --out") from None
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                os.close(descriptor)
                raise
            self.on_message(
                f"{self.path.parent} has no file locks ({error.strerror}): nothing keeps a second process out of"
                f" {self.subject}"
            )
            return descriptor
        except BaseException:
            os.close(descriptor)
            raise

    def _is(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), self.path.stat())
        except OSError:
            return False

    @property
    def in_place(self) -> bool:
        """Whether the lock file is still where it was made: its folder was neither moved nor deleted."""
        return self.descriptor is None or self._is(self.descriptor)

    def release(self) -> None:
        """Let go, and take away the lock file and whatever folder was made for nothing."""
        if self.descriptor is not None:
            # Removed while it is held: who waits on this very file sees that, and makes a new one.
            if self._is(self.descriptor):
                self.path.unlink(missing_ok=True)
            os.close(self.descriptor)
            self.descriptor = None
        self._remove_folders()

    def _make_folder(self) -> None:
        missing, folder = [], self.path.parent
        while not folder.exists() and folder != folder.parent:
            missing.append(folder)
            folder = folder.parent
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{self.path.parent} cannot be made: {error.strerror}") from error
        self.made = missing

    def _remove_folders(self) -> None:
        for folder in self.made:
            try:
                folder.rmdir()
            except OSError:  # it holds something
                break
        self.made = []


LOCK = ".resode.lock"


class FolderLock(Lock):
    """The lock on the folder of a run."""

    def __init__(self, folder: Path, *, on_message: Callable[[str], None] = lambda message: None) -> None:
        super().__init__(folder / LOCK, str(folder), on_message=on_message)
        self.folder = folder

    def ensure(self) -> Path:
        """The folder to write to now: the run's own, made again if it was moved or deleted.

        Where another run has taken its place meanwhile, a new folder beside it takes over.
        """
        if self.in_place and self.folder.is_dir():
            return self.folder
        gone, count = self.folder, 1
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None
        while True:
            try:
                if not self._is_taken():
                    self.acquire()
                    break
            except Locked:
                pass
            count += 1
            self.folder = gone.with_name(f"{gone.name}-{count}")
            self.path, self.subject = self.folder / LOCK, str(self.folder)
        self.made = []  # what is written to it now is to stay
        self.on_message(
            f"the folder {gone} was moved or deleted; what this run saves from here on goes to {self.folder}"
            + (", made anew" if self.folder == gone else "")
        )
        return self.folder

    def _is_taken(self) -> bool:
        return self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir()))


def is_written_to(folder: Path) -> bool:
    """Whether a run is writing to a folder, as its lock file says; a process of another host is taken for alive.

    The lock itself is not tried: a run that begins at that moment would find it held.
    """
    try:
        holder = (folder / LOCK).read_text(errors="replace").split()
    except OSError:
        return False
    match holder:
        case ["process", number, "on", host] if number.isdigit():
            return host != socket.gethostname() or is_alive(int(number))
    return False


def file_lock(path: Path, *, on_message: Callable[[str], None] = lambda message: None) -> Lock:
    """The lock on a file that will be written after minutes of work."""
    return Lock(path.with_name(f".{path.name}.lock"), str(path), on_message=on_message)


class NoLock(FolderLock):
    """Of a process that writes nothing, beside the one that holds the lock."""

    def acquire(self) -> None:
        pass

    def ensure(self) -> Path:
        return self.folder
