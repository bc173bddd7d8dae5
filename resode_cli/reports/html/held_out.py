"""What a run's model makes of images that it was not trained on: by class, as a matrix, and its worst mistakes."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image

from ...measuring.multi_label import THRESHOLD, LabelResults
from ...quantities import counted
from .curves import percent
from .markup import Markup, element, folded, joined, paragraph, scrolling, section, table

if TYPE_CHECKING:
    from ...measuring.by_image import ImageResults
    from ...measuring.class_figures import ClassFigures

MOST_CLASSES = 30  # that a matrix is drawn for; of more, the commonest confusions are listed
PAIRS = 40
LARGEST = 200  # pixels of a picture's longer side
SMALL = 64  # below, pixels are shown as they are


@dataclass(frozen=True)
class Mistake:
    """A wrong prediction. picture: the image before any transform; None where it cannot be read now.

    probability: of the prediction; None where that says of several labels how probable each is.
    """

    path: str
    label: str
    prediction: str
    probability: float | None
    loss: float
    picture: Image.Image | None


@dataclass(frozen=True)
class HeldOut:
    """model: which of the run's, in words. where: data and split, and what part they had in the run."""

    model: str
    where: str
    class_names: Sequence[str]
    results: ImageResults | LabelResults
    mistakes: Sequence[Mistake]
    notes: Sequence[str] = ()

    @property
    def summary(self) -> str:
        results = self.results
        return percent(results.evaluation.map if isinstance(results, LabelResults) else results.top1)


def held_out_section(found: HeldOut | str, name: str) -> Markup:
    """found: the results, or why there are none."""
    title = f"On images: {name}"
    if isinstance(found, str):
        return section(title, paragraph(found, class_="note"))
    results = found.results
    if isinstance(results, LabelResults):
        return _of_labels(found, results, title)
    mean = results.losses.double().mean().item()
    told = (
        f"The {found.model} model on {counted(len(results), 'image')} of {found.where}: top-1 {percent(results.top1)},"
        f" top-5 {percent(results.top5.double().mean().item())}, loss {mean:.4f}."
    )
    small = results.classes <= MOST_CLASSES
    return section(
        title,
        paragraph(told),
        *(paragraph(note, class_="note") for note in found.notes),
        element("h3", "Which classes are taken for which"),
        _matrix(results, found.class_names) if small else _pairs(results, found.class_names),
        element("h3", "By class"),
        _by_class(results.by_class(), found.class_names),
        *([element("h3", "Worst mistakes"), _mistakes(found.mistakes)] if found.mistakes else []),
    )


def _of_labels(found: HeldOut, results: LabelResults, title: str) -> Markup:
    """Of images with several labels, which no matrix of confusions is of."""
    figures = results.evaluation
    told = (
        f"The {found.model} model on {counted(len(results), 'image')} of {found.where}: mean average precision"
        f" {percent(figures.map)}; with the labels whose probability is {percent(THRESHOLD)} at least: micro-F1"
        f" {percent(figures.micro_f1)}, macro-F1 {percent(figures.macro_f1)}, all labels of an image right"
        f" {percent(figures.exact_match)}; loss {figures.loss:.4f}."
    )
    return section(
        title,
        paragraph(told),
        *(paragraph(note, class_="note") for note in found.notes),
        element("h3", "By class"),
        _by_class(results.by_class(), found.class_names, results.average_precisions),
        *([element("h3", "Worst mistakes"), _mistakes(found.mistakes)] if found.mistakes else []),
    )


def _matrix(results: ImageResults, names: Sequence[str]) -> Markup:
    """Rows: the class; columns: what it was taken for. A cell is as dark as its share of the row."""
    counts = results.pairs
    rows = []
    for label, name in enumerate(names):
        total = sum(counts.get((label, guess), 0) for guess in range(len(names)))
        cells = []
        for guess in range(len(names)):
            count = counts.get((label, guess), 0)
            style = f"--share:{0.75 * count / total:.2f}" if count else None
            cells.append(element("td", str(count or ""), style=style, class_="right" if label == guess else None))
        rows.append(element("tr", element("th", name, scope="row"), *cells))
    head = element("tr", element("th", "class"), *(element("th", name, scope="col") for name in names))
    caption = "Confusion matrix: a row for each class, a column for what its images were taken for, in images"
    made = element(
        "table",
        element("caption", caption),
        element("thead", head),
        element("tbody", joined(rows)),
        class_="confusion",
    )
    return scrolling(made, "Confusion matrix")


def _pairs(results: ImageResults, names: Sequence[str]) -> Markup:
    own = {label: figures.images for label, figures in enumerate(results.by_class())}
    rows = [
        [names[label], names[guess], f"{count:,}", percent(count / own[label])]
        for label, guess, count in results.confused(PAIRS)
    ]
    if not rows:
        return paragraph("No image is taken for another class.")
    caption = f"The commonest confusions among {len(names):,} classes"
    return table(caption, ["class", "taken for", "images", "of the class"], rows, words=2)


def _by_class(
    figures: Sequence[ClassFigures], names: Sequence[str], precisions: Sequence[float | None] | None = None
) -> Markup:
    """precisions: the average precision of each class, where there is one."""
    header = ["class", "images", "precision", "recall", "F1", *([] if precisions is None else ["average precision"])]
    told = []
    for place, (own, name) in enumerate(zip(figures, names, strict=True)):
        if own.images or own.predicted:
            more = [] if precisions is None else [precisions[place]]
            shares = ("–" if v is None else percent(v) for v in (own.precision, own.recall, own.f1, *more))
            told.append((own.f1, [name, f"{own.images:,}", *shares]))
    rows = [row for _, row in told]
    caption = (
        "Precision: the share of what is taken for the class that is of it. Recall: the share of it that is found."
    )
    if len(rows) <= MOST_CLASSES:
        return table(caption, header, rows)
    worst = [row for _, row in sorted(told, key=lambda pair: pair[0] or 0.0)][:MOST_CLASSES]
    whole = folded(f"All {len(rows):,} classes", table(caption, header, rows))
    return joined([table(f"The {MOST_CLASSES} classes with the lowest F1. {caption}", header, worst), whole])


def _mistakes(mistakes: Sequence[Mistake]) -> Markup:
    return element("ul", *(_mistake(mistake) for mistake in mistakes), class_="pictures")


def _mistake(found: Mistake) -> Markup:
    told = [
        ("is", found.label),
        ("taken for", found.prediction + ("" if found.probability is None else f", {percent(found.probability)}")),
        ("loss", f"{found.loss:.3f}"),
    ]
    return element(
        "li",
        _picture(found),
        element("dl", *(part for name, value in told for part in (element("dt", name), element("dd", value)))),
        element("div", found.path, class_="path"),
    )


def _picture(found: Mistake) -> Markup:
    if found.picture is None:
        return paragraph("(cannot be read any more)", class_="note")
    width, height = found.picture.size
    alt = f"{found.label}, taken for {found.prediction}: {found.path}"
    kind = "small" if max(width, height) <= SMALL else None
    return element("img", src=data_uri(found.picture), alt=alt, width=width, height=height, loading="lazy", class_=kind)


def data_uri(picture: Image.Image) -> str:
    """A small copy of a picture in the page itself: what is small already loses nothing."""
    copy, text = picture.convert("RGB"), io.BytesIO()
    if max(copy.size) <= SMALL:
        copy.save(text, "PNG", optimize=True)
        return f"data:image/png;base64,{base64.b64encode(text.getvalue()).decode()}"
    copy.thumbnail((LARGEST, LARGEST))
    copy.save(text, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(text.getvalue()).decode()}"
