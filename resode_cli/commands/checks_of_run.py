"""What `resode finetune` refuses before anything is read."""

from __future__ import annotations

from pathlib import Path

from ..errors import UsageError
from ..training.settings import Settings
from .parameters import Given


def check_teacher_is_named(settings: Settings, given: Given) -> None:
    """Raises UsageError for a setting of the teacher without one."""
    for name in ("distill", "temperature", "teacher_states"):
        if name in given.all and settings.teacher is None:
            raise UsageError(f"--{name.replace('_', '-')} is a setting of the teacher; add --teacher MODEL")
    if "teacher" in given.all and not (settings.distill or settings.teacher_states):
        raise UsageError("--distill 0 learns nothing from --teacher: give it a weight, or one to --teacher-states")


def check_looks(*, dry_run: bool, find_lr: bool) -> None:
    """Raises UsageError for two looks at a run at once."""
    if dry_run and find_lr:
        raise UsageError("--dry-run takes no step, --find-lr some: leave out one")


def check_resumes(*, dry_run: bool, find_lr: bool, force: bool, begins: bool) -> None:
    """Raises UsageError for what a run that goes on cannot have. begins: a flag says how a run begins."""
    if dry_run or find_lr:
        flag = "--dry-run" if dry_run else "--find-lr"
        raise UsageError(f"{flag} looks at a run before it begins, and --resume goes on with one: leave out one")
    if force:
        raise UsageError("--resume goes on with the run in --out, --force replaces it: give one of them")
    if begins:
        raise UsageError(
            "--new-head, --weights and --no-pretrained are of a run that begins, and --resume goes on with one"
        )


def check_is_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {str(out)!r} is not a folder")
