"""A model in formats that other programs read, each checked by reading it back and comparing logits.

| suffix       | what                                                      | of which models            |
| .safetensors | the source's own state dict, which its library loads      | native depth, Euler, exact |
| .pt2         | a `torch.export` program                                  | any                        |
| .onnx        | an ONNX graph (needs onnx, onnxscript and onnxruntime)    | any                        |
"""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import ResodeError, UsageError
from ..machine.atomic import atomic_path, is_full
from ..network.model import OdeResNet, describe_misfit
from ..network.parts import SourceSpec
from ..network.residual import GENERIC, LINEAR
from ..network.stage import OdeStage
from ..ode import Adjoint
from ..sources.registry import build
from ..surgery.convert import LOGITS_AGREE, Verification, compare_logits

INPUT, OUTPUT = "images", "logits"


def source_state(model: OdeResNet) -> dict[str, Tensor]:
    """The state dict of the source network that computes what the model computes.

    Steps that share a block become copies of it. Raises ResodeError for a stage that the source's blocks, one
    per step, do not express: another depth or horizon, the Heun rule, `pre` form, weights linear in depth.
    """
    inside = {f"{path}." for path in model.paths.values()}
    state = {
        model.file_name(key): value.detach().clone()
        for key, value in model.net.state_dict().items()
        if not any(key.startswith(prefix) for prefix in inside)
    }
    for stage in model.stages.values():
        _check_native(stage)
        prefix = f"{stage.spec.container}." if stage.spec.container else ""
        children = [(name, stage.get_submodule(name)) for name in stage.spec.transition]
        children += [
            (name, stage.blocks[b]) for name, b in zip(stage.spec.source_blocks, stage.spec.schedule, strict=True)
        ]
        for name, child in children:
            for key, value in child.state_dict().items():
                state[f"{prefix}{name}.{key}"] = value.detach().clone()
    return state


def _check_native(stage: OdeStage) -> None:
    spec = stage.spec
    native = len(spec.source_blocks)
    problem = ""
    if spec.depth != native:
        problem = f"takes {spec.depth} steps instead of {native}"
    elif spec.horizon != spec.depth:
        problem = f"has steps of size {spec.step_size:g} instead of 1"
    elif spec.scheme != "euler" and spec.depth:
        problem = f"takes {spec.scheme} steps"
    elif spec.blends:
        problem = "has weights linear in depth (`resode untie` gives every step its own)"
    elif spec.form == "pre" and spec.depth and stage.activation not in (LINEAR, GENERIC):
        problem = "is in pre form"
    if problem:
        raise ResodeError(
            f"stage {spec.name} {problem}, which the source's blocks cannot express; export to .pt2 or .onnx instead"
        )


def export(
    model: OdeResNet, path: Path, images: Tensor, *, fixed_batch: bool = False, origin: SourceSpec | None = None
) -> Verification:
    """Write the model to `path` in the format of its suffix, and compare logits on `images` (B, 3, H, W).

    origin: what builds the source network that a state dict is tried on, where the model's own has moved.
    fixed_batch: the exported graph takes batches of B images alone; otherwise of any number.
    Nothing is left at `path` if the model cannot be exported, or the logits read back are not its own.
    """
    writers: dict[str, Callable[[nn.Module, Path, Tensor, bool], Tensor]] = {
        ".pt2": _write_program,
        ".onnx": _write_onnx,
    }
    if path.suffix != ".safetensors" and path.suffix not in writers:
        allowed = ".safetensors, " + ", ".join(writers)
        raise UsageError(f"output {str(path)!r}: the suffix names the format (allowed: {allowed})")
    model = copy.deepcopy(model).cpu().eval()
    model.use_adjoint(Adjoint("backprop"))
    with torch.no_grad(), atomic_path(path) as temporary:
        expected = model(images)
        if path.suffix == ".safetensors":
            found = _write_state(model, temporary, images, origin or model.info.source)
        else:
            try:
                found = writers[path.suffix](model, temporary, images, fixed_batch)
            except ResodeError:
                raise
            except Exception as error:  # of many kinds, from deep inside
                if is_full(error):
                    raise
                reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
                hint = "" if fixed_batch else "; --batch-size N may help, for a graph of that many images alone"
                raise ResodeError(f"{path.name}: the network cannot be exported: {reason}{hint}") from error
        result = compare_logits(expected, found, batch="random images", kept=True)
        if not result.max_difference <= LOGITS_AGREE * max(expected.abs().max().item(), 1.0):
            raise ResodeError(
                f"{path.name}: what was exported differs from the model by {result.max_difference:.3g}; not written"
            )
    return result


def _write_state(model: OdeResNet, path: Path, images: Tensor, origin: SourceSpec) -> Tensor:
    state = source_state(model)
    if origin.library == "module":
        raise ResodeError("made of a network from Python: `source_state(model)` there is what its own class loads")
    net = build(origin).to(images.dtype)
    net.eval()
    problems = describe_misfit(net.state_dict(), state)
    if problems:
        raise ResodeError(f"the state dict does not fit {origin}: {problems}")
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    net.load_state_dict(load_file(path))
    return net(images)


def _write_program(model: nn.Module, path: Path, images: Tensor, fixed_batch: bool) -> Tensor:
    program = torch.export.export(model, (images,), dynamic_shapes=_shapes(fixed_batch))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    path.write_bytes(buffer.getvalue())
    return torch.export.load(io.BytesIO(path.read_bytes())).module()(images)


def _write_onnx(model: nn.Module, path: Path, images: Tensor, fixed_batch: bool) -> Tensor:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ResodeError(f"ONNX needs {error.name}: pip install 'resode[onnx]'") from error
    with _quiet():
        program = torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            verbose=False,
            dynamic_shapes=_shapes(fixed_batch),
            input_names=[INPUT],
            output_names=[OUTPUT],
        )
        assert program is not None
        program.save(path)
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


def _shapes(fixed_batch: bool) -> Any:
    return None if fixed_batch else ({0: torch.export.Dim("batch")},)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on its own progress and on what torch deprecates inside it."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
