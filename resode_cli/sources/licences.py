"""Under which licence a source's pretrained weights are, and where they are published, where their library says so."""

from __future__ import annotations

from ..network.parts import SourceSpec


def licence_of(spec: SourceSpec) -> str | None:
    """As the hub spells it: 'apache-2.0', 'cc-by-nc-4.0', …; None where nobody says."""
    if spec.tag is None:
        return None
    if spec.library == "timm":
        return _timm(spec, "license")
    return None


def published(spec: SourceSpec) -> str | None:
    """The repository on the Hugging Face hub that the weights came from."""
    if spec.weights is not None and spec.weights.startswith("hf-hub:"):
        return spec.weights.removeprefix("hf-hub:")
    return _timm(spec, "hf_hub_id") if spec.library == "timm" and spec.tag else None


def _timm(spec: SourceSpec, name: str) -> str | None:
    import timm

    full = f"{spec.name.partition('.')[0]}.{spec.tag}"
    config = timm.get_pretrained_cfg(full)
    found = getattr(config, name, None)
    if name == "hf_hub_id" and found == "timm/":  # the repository has the name's own
        return f"{found}{full}"
    return found if isinstance(found, str) and found else None
