"""The README.md of a published model: what it is, how to load it, and what is known of it. What is not, it says too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from huggingface_hub import ModelCardData

from .. import __version__
from ..errors import join, one_line
from ..files.description import KEY, public_name
from ..network.model import OdeResNet
from ..quantities import counted
from ..sources.licences import licence_of, published

SHOWN = 20  # class names
WHAT = {
    "timm": "a folder that timm loads",
    "safetensors": "its source's own state dict",
    "pt2": "a `torch.export` program",
    "onnx": "an ONNX graph",
}
LIBRARIES = {"timm": "timm", "onnx": "onnx"}  # as the hub calls them


def model_card(model: OdeResNet, kind: str, name: str, *, repository: str | None = None) -> str:
    """As Markdown, behind the hub's own fields.

    kind: a name of `formats.SUFFIXES`. name: of the exported file or folder. repository: on the hub, where it goes.
    """
    source, licence = model.info.source, licence_of(model.info.source)
    base = published(source)
    fields = ModelCardData(
        license=licence,
        library_name=LIBRARIES.get(kind),
        pipeline_tag="image-classification",
        tags=["image-classification", "resode"],
        base_model=base,
    )
    steps = join([f"{key} {counted(stage.spec.depth, 'step')}" for key, stage in model.stages.items()])
    sections = {
        "": f"`{public_name(source)}`, {model.info.num_classes} classes, as {WHAT[kind]}."
        f" Residual stages: {steps}. Exported by resode {__version__}.",
        "Loading": f"```python\n{_loading(model, kind, name, repository)}\n```",
        "Images": _images(model),
        "Classes": _classes(model),
        "Accuracy": _accuracy(model),
        "Gradients": _gradients(model),
        "How it was made": "```text\n" + "\n".join(history_line(e) for e in model.info.history) + "\n```",
        "Licence": _licence(model, licence, base),
    }
    title = repository.rpartition("/")[2] if repository else name
    text = "\n\n".join(f"## {heading}\n\n{body}" if heading else body for heading, body in sections.items())
    return f"---\n{fields.to_yaml().strip()}\n---\n\n# {title}\n\n{text}\n"


def history_line(entry: Mapping[str, Any]) -> str:
    """A command and its settings. Folders of whoever ran it are nobody else's business: a path is its last name."""
    settings = {k: v for k, v in entry.items() if k not in ("command", "verified", "measured", "pieces")}
    return one_line(f"{entry['command']} {', '.join(f'{k}={_public(v)}' for k, v in settings.items())}").strip()


def _public(value: object) -> object:
    if isinstance(value, str) and (":" in value or "/" in value or "\\" in value):
        place, colon, function = value.rpartition(":") if ".py:" in value else (value, "", "")
        if place.startswith(("/", "~", "..")) or (":\\" in place):
            return PurePath(place.replace("\\", "/")).name + colon + function
    if isinstance(value, Mapping):
        return {key: _public(each) for key, each in value.items()}
    return [_public(each) for each in value] if isinstance(value, list | tuple) else value


def _loading(model: OdeResNet, kind: str, name: str, repository: str | None) -> str:
    if kind == "timm":
        mode = "L" if model.info.preprocessing.channels == 1 else "RGB"
        where = f"hf-hub:{repository}" if repository else f"local-dir:{name}"
        return (
            "import timm\nfrom PIL import Image\n\n"
            f'network = timm.create_model("{where}", pretrained=True).eval()\n'
            "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))\n"
            f'logits = network(transform(Image.open("image.jpg").convert("{mode}")).unsqueeze(0))\n'
            'network.pretrained_cfg.get("label_names")  # of the classes, in the order of the logits'
        )
    path = f'"{name}"'
    fetch = ""
    if repository:
        fetch = f'from huggingface_hub import hf_hub_download\n\npath = hf_hub_download("{repository}", {path})\n'
        path = "path"
    about = "  # class_names, input_size, mean, std, interpolation, crop_fraction, crop_mode, …"
    if kind == "pt2":
        return (
            f'import json\n\nimport torch\n{fetch}\nsaid = {{"{KEY}": ""}}\n'
            f"network = torch.export.load({path}, extra_files=said).module()\n"
            f'about = json.loads(said["{KEY}"]){about}\nlogits = network(images)  # (B, C, H, W)'
        )
    if kind == "onnx":
        return (
            f"import json\n\nimport onnxruntime\n{fetch}\nsession = onnxruntime.InferenceSession({path})\n"
            f'about = json.loads(session.get_modelmeta().custom_metadata_map["{KEY}"]){about}\n'
            '(logits,) = session.run(["logits"], {"images": images})  # (B, C, H, W), float32'
        )
    return (
        f"import json\n\nfrom safetensors import safe_open\nfrom safetensors.torch import load_file\n{fetch}\n"
        f"network.load_state_dict(load_file({path}))  # network: {public_name(model.info.source)},"
        f" with {model.info.num_classes} classes\n"
        f'about = json.loads(safe_open({path}, "pt").metadata()["{KEY}"]){about}'
    )


def _images(model: OdeResNet) -> str:
    pre = model.info.preprocessing
    colours = {1: "grey", 3: "RGB"}.get(pre.channels, f"{pre.channels} channels")
    return (
        f"{pre.size_text} (height by width), {colours}, {pre.interpolation}, crop {pre.crop_fraction:g}"
        f" ({pre.crop_mode}); of values in [0, 1] mean {list(pre.mean)} and std {list(pre.std)}."
    )


def _classes(model: OdeResNet) -> str:
    names = model.info.class_names
    several = " An image may have any number of them; the sigmoid of a logit is that class's probability."
    several = several if model.info.multi_label else ""
    if names is None:
        return f"{model.info.num_classes}, without names.{several}"
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)}: {one_line(', '.join(names[:SHOWN]))}{rest}.{several}"


def _accuracy(model: OdeResNet) -> str:
    history = model.info.history
    for place in reversed(range(len(history))):
        found = history[place].get("measured")
        names = ("top1", "map")
        main = next((n for n in names if isinstance(found, dict) and isinstance(found.get(n), float)), None)
        if not isinstance(found, dict) or main is None:
            continue
        since = join(list(dict.fromkeys(str(later["command"]) for later in history[place + 1 :])))
        where = one_line(f"{_public(history[place].get('data'))}, {found.get('split')}")
        return (
            f"{'Top-1' if main == 'top1' else 'Mean average precision'} {found[main]:.2%} on {found.get('images')}"
            f" images ({where}), as `{history[place]['command']}`"
            " measured it to choose this model among those of its run."
            + (f" Not measured since: {since} came after." if since else "")
        )
    return "Not recorded. `resode eval MODEL --data DATA` measures it."


def _gradients(model: OdeResNet) -> str:
    runs = [entry for entry in model.info.history if entry["command"] == "finetune"]
    if not runs:
        return "No gradient method of resode trained these weights."
    method = one_line(str(runs[-1].get("adjoint")))
    chosen = next((e["pieces"] for e in reversed(model.info.history) if e["command"] == "calibrate"), None)
    if not isinstance(chosen, dict) or "auto" not in method:
        return (
            f"Trained with `--adjoint {method}`. Errors are not recorded: `resode check-grad MODEL --data DATA`"
            " measures them against backprop."
        )
    rows = [f"| {one_line(str(p))} | {one_line(str(c['adjoint']))} | {_error(c['error'])} |" for p, c in chosen.items()]
    return (
        f"Trained with `--adjoint {method}`, which chose for each piece of the network, by the error of its gradient"
        " relative to backprop's:\n\n| piece | method | gradient error |\n| --- | --- | --- |\n" + "\n".join(rows)
    )


def _error(value: object) -> str:
    return f"{value:.2g}" if isinstance(value, int | float) else "not measured"


def _licence(model: OdeResNet, licence: str | None, base: str | None) -> str:
    if model.info.source.weights_sha256 is None:
        return "The source's weights were random: no licence came with them. Whoever publishes these says which holds."
    if licence is None:
        return "That of the source's weights is not known to resode. Whoever publishes these says which holds."
    origin = f", {base}," if base else ""
    return f"The source's weights{origin} are under {licence}, as timm says."
