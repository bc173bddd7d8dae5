"""An adjoint as a user asks for it: a fixed one, or one to be chosen stage by stage.

auto   multistep   pc:anchors=10   pc:corrections=2   checkpoint:snapshots=12   multistep:anchors=auto
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UsageError, unknown
from ..ode import METHODS, Adjoint, required_scheme, settings_of

AUTO = "auto"
NONE = "none"
NAMES = (AUTO, *METHODS)
SETTINGS = ("anchors", "corrections", "snapshots")


@dataclass(frozen=True)
class AdjointChoice:
    """fixed: the adjoint, or None if it is to be chosen among `methods` (None: all but backprop)."""

    name: str
    fixed: Adjoint | None
    methods: tuple[str, ...] | None = None

    @property
    def label(self) -> str:
        if self.fixed is not None:
            return self.fixed.label
        return AUTO if self.methods is None else f"{self.name}, anchors auto"

    @property
    def required_scheme(self) -> str | None:
        return None if self.name == AUTO else required_scheme(self.name)


def parse_adjoint(
    name: str, *, anchors: str | None = None, corrections: int = 0, snapshots: int | None = None
) -> AdjointChoice:
    """One adjoint from what a user wrote; anchors: a number, 'auto', 'none' or None for the method's own.

    Raises UsageError for an unknown name, and for settings that the method does not take.
    """
    if name not in NAMES:
        raise unknown("adjoint", name, NAMES)
    spacing = _spacing(anchors)
    if name == AUTO:
        if spacing is not None or corrections or snapshots is not None:
            raise UsageError("adjoint 'auto' chooses its own anchors, corrections and snapshots")
        return AdjointChoice(name, None)
    if anchors == NONE and "snapshots" in settings_of(name):
        raise UsageError(f"{name} runs forward from held states and needs some: give --anchors K or --snapshots S")
    if spacing == AUTO:
        if corrections or snapshots is not None:
            raise UsageError("with anchors 'auto', corrections and snapshots are chosen too")
        if "anchors" not in settings_of(name):
            raise UsageError(f"{name} holds every activation and takes no anchors")
        return AdjointChoice(name, None, (name,))
    assert spacing is None or isinstance(spacing, int)
    return AdjointChoice(name, Adjoint(name, spacing, corrections, snapshots))


def parse_adjoints(
    text: str, *, anchors: str | None = None, corrections: int = 0, snapshots: int | None = None
) -> list[AdjointChoice]:
    """A comma-separated list, each entry with settings of its own after colons, as in 'auto,pc:anchors=10'.

    The keywords hold for every method of the list that takes them and does not say otherwise.
    Raises UsageError for a setting that no method of the list takes.
    """
    taken: set[str] = set()
    found = []
    for entry in text.split(","):
        name, *settings = (part.strip() for part in entry.split(":"))
        own: dict[str, str] = {}
        for setting in settings:
            key, equals, value = setting.partition("=")
            if key not in SETTINGS:
                raise unknown("setting of an adjoint", key, SETTINGS)
            if not equals:
                raise UsageError(f"adjoint {entry.strip()!r}: write {key}=NUMBER")
            if key in own:
                raise UsageError(f"adjoint {entry.strip()!r}: {key} is given twice")
            own[key] = value
        known = settings_of(name)
        takes = {
            "anchors": "anchors" in known and not {"snapshots", "anchors"} & own.keys(),
            "corrections": "corrections" in known and "corrections" not in own and own.get("anchors") != AUTO,
            "snapshots": "snapshots" in known and not {"snapshots", "anchors"} & own.keys(),
        }
        if takes["snapshots"] and snapshots is not None:
            takes["anchors"] = False
        taken |= {key for key, does in takes.items() if does}
        found.append(
            parse_adjoint(
                name,
                anchors=own.get("anchors", anchors if takes["anchors"] else None),
                corrections=_count(own, "corrections", corrections if takes["corrections"] else 0) or 0,
                snapshots=_count(own, "snapshots", snapshots if takes["snapshots"] else None),
            )
        )
    given = {"anchors": anchors, "corrections": corrections or None, "snapshots": snapshots}
    for setting, wanted in given.items():
        if wanted is not None and setting not in taken:
            raise UsageError(f"--{setting} {wanted}: none of {text} takes {setting}")
    return found


def _spacing(anchors: str | None) -> int | str | None:
    if anchors is None or anchors == NONE:
        return None
    if anchors == AUTO:
        return AUTO
    try:
        return int(anchors)
    except ValueError:
        raise UsageError(f"anchors {anchors!r}: write a number of steps, 'auto' or 'none'") from None


def _count(own: dict[str, str], key: str, otherwise: int | None) -> int | None:
    if key not in own:
        return otherwise
    try:
        return int(own[key])
    except ValueError:
        raise UsageError(f"{key}={own[key]}: write a number") from None
