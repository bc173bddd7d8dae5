"""An adjoint as a user asks for it: a fixed one, or one to be chosen stage by stage.

auto   multistep   pc:anchors=10   pc:corrections=2   checkpoint:snapshots=12   checkpoint:bits=4:slices=8
multistep:anchors=auto

A list of them is for comparing (`parse_adjoints`); `stage_adjoints` reads one that gives stages their own.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UsageError, unknown
from ..ode import METHODS, Adjoint, required_scheme, settings_of
from ..options import ADJOINT_SETTINGS as SETTINGS

AUTO = "auto"
NONE = "none"
NAMES = (AUTO, *METHODS)


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
    name: str,
    *,
    anchors: str | None = None,
    corrections: int = 0,
    snapshots: int | None = None,
    slices: int | None = None,
    bits: int | None = None,
) -> AdjointChoice:
    """One adjoint from what a user wrote; anchors: a number, 'auto', 'none' or None for the method's own.

    Raises UsageError for an unknown name, and for settings that the method does not take.
    """
    if name not in NAMES:
        raise unknown("adjoint", name, NAMES)
    spacing = _spacing(anchors)
    others = {"corrections": corrections or None, "snapshots": snapshots, "slices": slices, "bits": bits}
    given = [key for key, value in others.items() if value is not None]
    if name == AUTO:
        if spacing is not None or given:
            raise UsageError(f"adjoint 'auto' chooses its own {', '.join(SETTINGS[:-1])} and {SETTINGS[-1]}")
        return AdjointChoice(name, None)
    if anchors == NONE and "snapshots" in settings_of(name):
        raise UsageError(f"{name} runs forward from held states and needs some: give --anchors K or --snapshots S")
    if spacing == AUTO:
        if given:
            raise UsageError(f"with anchors 'auto', {given[0]} are chosen too")
        if "anchors" not in settings_of(name):
            raise UsageError(f"{name} holds every activation and takes no anchors")
        return AdjointChoice(name, None, (name,))
    assert spacing is None or isinstance(spacing, int)
    if slices is not None and "slices" not in settings_of(name):
        raise UsageError(f"slices of the batch are for 'checkpoint'; {name} takes none")
    return AdjointChoice(name, Adjoint(name, spacing, corrections, snapshots, 1 if slices is None else slices, bits))


def parse_adjoints(
    text: str,
    *,
    anchors: str | None = None,
    corrections: int = 0,
    snapshots: int | None = None,
    slices: int | None = None,
    bits: int | None = None,
) -> list[AdjointChoice]:
    """A comma-separated list, each entry with settings of its own after colons, as in 'auto,pc:anchors=10'.

    The keywords hold for every method of the list that takes them and does not say otherwise.
    Raises UsageError for a setting that no method of the list takes.
    """
    common = {"corrections": corrections or None, "snapshots": snapshots, "slices": slices, "bits": bits}
    taken: set[str] = set()
    found = []
    for entry in text.split(","):
        name, *settings = (part.strip() for part in entry.split(":"))
        if "=" in name:
            raise UsageError(
                f"adjoint {entry.strip()!r}: methods are compared on all stages here; `resode finetune` takes one"
                " for each"
            )
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
        takes = {key: key in known and key not in own for key in SETTINGS}
        # Spacing and number of states, and codes of all of them, exclude each other.
        chosen = {"anchors", "snapshots", "bits"} & own.keys()
        takes |= {key: takes[key] and not chosen for key in ("anchors", "snapshots", "bits")}
        takes["corrections"] = takes["corrections"] and own.get("anchors") != AUTO
        if takes["snapshots"] and snapshots is not None:
            takes["anchors"] = False
        taken |= {key for key, does in takes.items() if does}
        values = {key: _count(own, key, value if takes[key] else None) for key, value in common.items()}
        found.append(
            parse_adjoint(
                name,
                anchors=own.get("anchors", anchors if takes["anchors"] else None),
                corrections=values["corrections"] or 0,
                snapshots=values["snapshots"],
                slices=values["slices"],
                bits=values["bits"],
            )
        )
    for setting, wanted in {"anchors": anchors, **common}.items():
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
