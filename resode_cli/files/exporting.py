"""A model in formats that other programs read, each checked by reading it back and comparing logits.

| suffix       | what                                                      | of which models            |
| .safetensors | the source's own state dict, which its library loads      | native depth, Euler, exact |
| .pt2         | a `torch.export` program                                  | any                        |
| .onnx        | an ONNX graph (needs onnx, onnxscript and onnxruntime)    | any                        |
| none: timm   | a folder as timm saves networks                           | the first's, of timm       |

Each says what its classes are called and how images become its input: see `description`.
"""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import ResodeError, join
from ..machine.atomic import atomic_folder, atomic_path, is_full
from ..network.model import OdeResNet, describe_misfit
from ..network.parts import SourceSpec
from ..network.residual import GENERIC, LINEAR
from ..network.stage import OdeStage
from ..ode import Adjoint
from ..sources.registry import build
from ..surgery.convert import LOGITS_AGREE, Verification, compare_logits
from .description import KEY, as_text, describe
from .formats import FOLDER, GRAPHS, Exporting, format_of
from .hub import CARD
from .timm_folder import check_timm, read_folder, write_folder

INPUT, OUTPUT = "images", "logits"
FURTHER = 32  # pixels by which images of another size are larger: networks halve states up to five times


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


@dataclass(frozen=True)
class Graph:
    """What an exported graph takes: how many images at once (None: any number), and whether of any size."""

    batch_size: int | None = None
    dynamic_size: bool = False

    def shapes(self, *, named: bool) -> Any:
        """As torch.export wants to hear of it; named: as torch.onnx does, which calls the sizes so in the graph."""
        batch = {0: "batch" if named else torch.export.Dim("batch")} if self.batch_size is None else {}
        sizes = {2: "height", 3: "width"} if self.dynamic_size else {}
        free = {**batch, **(sizes if named else dict.fromkeys(sizes, torch.export.Dim.DYNAMIC))}
        return (free,) if free else None

    def batches(self, images: Tensor) -> list[Tensor]:
        """On what a graph is compared with its model: the example, one image of it, images of unequal other sides."""
        found = [images]
        if self.batch_size is None:
            found.append(images[:1])
        if self.dynamic_size:
            count, channels, height, width = images.shape
            generator = torch.Generator().manual_seed(0)
            other = torch.randn(count, channels, height + FURTHER, width + 2 * FURTHER, generator=generator)
            found.append(other.to(images.dtype))
        return found

    def hint(self) -> str:
        """What may help where the network cannot be exported."""
        if self.dynamic_size:
            return "; without --dynamic-size it may be, for images of one size"
        return "" if self.batch_size else "; --batch-size N may help, for a graph of that many images alone"


Read = Callable[[Tensor], Tensor]


def export(
    model: OdeResNet,
    path: Path,
    images: Tensor,
    *,
    kind: str | None = None,
    graph: Graph | None = None,
    origin: SourceSpec | None = None,
    card: str | None = None,
) -> Verification:
    """Write the model to `path`, and compare the logits of what was written on `images` (B, C, H, W).

    kind: a name of `formats.SUFFIXES`; by default that of the path's suffix.
    graph: what a .pt2 or .onnx takes beside the example; by default any number of images of its size.
    origin: what builds the source network that a state dict is tried on, where the model's own has moved.
    card: the text of a README.md, for a folder.
    Nothing is left at `path` if the model cannot be exported, or the logits read back are not its own.
    """
    graph = graph or Graph()
    kind = kind or format_of(str(path), Exporting())
    origin = origin or model.info.source
    if kind == FOLDER:
        check_timm(origin)
    model = copy.deepcopy(model).cpu().eval()
    model.use_adjoint(Adjoint("backprop"))
    batches = graph.batches(images) if kind in GRAPHS else [images]
    with torch.no_grad(), atomic_folder(path) if kind == FOLDER else atomic_path(path) as temporary:
        expected = [_logits(model, batch, images) for batch in batches]
        if kind in GRAPHS:
            write = _write_program if kind == "pt2" else _write_onnx
            try:
                read = write(model, temporary, images, graph)
                found = [read(batch) for batch in batches]
            except ResodeError:
                raise
            except Exception as error:  # of many kinds, from deep inside
                if is_full(error):
                    raise
                raise ResodeError(
                    f"{path.name}: the network cannot be exported: {_reason(error)}{graph.hint()}"
                ) from error
        else:
            write_tensors = _write_timm if kind == FOLDER else _write_state
            found = [write_tensors(model, temporary, images, origin)(images)]
        if card is not None and kind == FOLDER:
            (temporary / CARD).write_text(card, encoding="utf-8")
        return _compare(path.name, expected, found, batches)


def _logits(model: OdeResNet, batch: Tensor, example: Tensor) -> Tensor:
    """Raises ResodeError for a network that takes no images of another size than the example's."""
    try:
        return model(batch)
    except Exception as error:
        if batch.shape[2:] == example.shape[2:]:
            raise
        raise ResodeError(
            f"--dynamic-size: {model.info.source} takes images of {_size(example)}, and none of {_size(batch)}:"
            f" {_reason(error)}"
        ) from error


def _size(batch: Tensor) -> str:
    return f"{batch.shape[2]}×{batch.shape[3]}"


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _compare(name: str, expected: Sequence[Tensor], found: Sequence[Tensor], batches: Sequence[Tensor]) -> Verification:
    sizes = join(list(dict.fromkeys(_size(batch) for batch in batches)))
    result = compare_logits(torch.cat([*expected]), torch.cat([*found]), batch=f"random images, {sizes}", kept=True)
    scale = max(logits.abs().max().item() for logits in expected)
    if not result.max_difference <= LOGITS_AGREE * max(scale, 1.0):
        raise ResodeError(
            f"{name}: what was exported differs from the model by {result.max_difference:.3g}; not written"
        )
    return result


def _source(model: OdeResNet, origin: SourceSpec, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Tensor]]:
    """The source network anew, and the state dict with which it computes what the model computes."""
    state = source_state(model)
    if origin.library == "module":
        raise ResodeError("made of a network from Python: `source_state(model)` there is what its own class loads")
    net = build(origin).to(dtype)
    net.eval()
    problems = describe_misfit(net.state_dict(), state)
    if problems:
        raise ResodeError(f"the state dict does not fit {origin}: {problems}")
    return net, {name: value.contiguous() for name, value in state.items()}


def _write_state(model: OdeResNet, path: Path, images: Tensor, origin: SourceSpec) -> Read:
    net, state = _source(model, origin, images.dtype)
    save_file(state, path, metadata={KEY: as_text(describe(model))})  # one entry: several would stand in any order
    net.load_state_dict(load_file(path))
    return net


def _write_timm(model: OdeResNet, folder: Path, images: Tensor, origin: SourceSpec) -> Read:
    net, state = _source(model, origin, images.dtype)
    net.load_state_dict(state)
    write_folder(model, net, folder, origin)
    return read_folder(folder, images)


def _write_program(model: OdeResNet, path: Path, images: Tensor, graph: Graph) -> Read:
    program = torch.export.export(model, (images,), dynamic_shapes=graph.shapes(named=False))
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={KEY: as_text({**describe(model), **_of_graph(graph)})})
    path.write_bytes(buffer.getvalue())
    read: Read = torch.export.load(io.BytesIO(path.read_bytes())).module()
    return read


def _write_onnx(model: OdeResNet, path: Path, images: Tensor, graph: Graph) -> Read:
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
            dynamic_shapes=graph.shapes(named=True),
            input_names=[INPUT],
            output_names=[OUTPUT],
        )
        assert program is not None
        program.model.metadata_props[KEY] = as_text({**describe(model), **_of_graph(graph)})
        program.save(path)
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return lambda batch: torch.from_numpy(session.run([OUTPUT], {INPUT: batch.numpy()})[0])


def _of_graph(graph: Graph) -> dict[str, Any]:
    return {"input_name": INPUT, "output_name": OUTPUT, **asdict(graph)}


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
