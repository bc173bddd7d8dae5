"""The page on runs: what is text stays text, axes hold their values, and the file is whole and asks for nothing."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image
from small_pages import EVIL, held_out, record

from resode_cli.reports.html.held_out import data_uri
from resode_cli.reports.html.markup import Markup, element, joined, markup, table
from resode_cli.reports.html.page import BEGINNING, page, run_names
from resode_cli.reports.html.plots import MOST, Curve, axis, log_axis, plot, thinned
from resode_cli.training.run_record import RunRecord


def parsed(text: str) -> ElementTree.Element:
    """The page as a tree: every element is closed, and every text escaped."""
    assert text.startswith(BEGINNING)
    return ElementTree.fromstring(text.removeprefix(BEGINNING))


def page_of(*runs: RunRecord, found: Any = "") -> str:
    return page(runs, [found] * len(runs), now=datetime(2026, 1, 2, 3, 4))


@pytest.mark.parametrize("classes", [[EVIL, "b"], [EVIL] + [f"{EVIL}{i}" for i in range(40)]], ids=["few", "many"])
def test_text_of_files_is_text(classes: list[str]) -> None:
    text = page_of(record(EVIL, notes=(EVIL,), recipe=f"# {EVIL}"), found=held_out(classes))
    assert "<script" not in text.lower() and "alert(1)" in text
    found = list(parsed(text).itertext())
    assert any(EVIL in each for each in found)


def test_attributes_and_control_characters_are_escaped() -> None:
    made = element("img", alt='a" onerror="alert(1)', src="x")
    assert made == '<img alt="a&quot; onerror=&quot;alert(1)" src="x"/>'
    assert markup("a\x1b[2J\u202eb\udc80") == "a\\x1b[2J\\u202eb\\udc80"
    assert markup(Markup("<b>")) == "<b>" and isinstance(joined(["<", Markup("<i/>")]), Markup)
    assert joined(["<", Markup("<i/>")], " & ") == "&lt; &amp; <i/>"
    assert element("td", 3, None, class_="x", data_x=None) == '<td class="x">3</td>'


def test_the_page_is_whole_and_asks_for_nothing() -> None:
    text = page_of(record("a"), record("b", rows={"train": [], "test": []}), found=held_out(["x", "y"]))
    root = parsed(text)
    tags = {each.tag for each in root.iter()}
    assert not tags & {"script", "link", "iframe", "object", "base", "form"}
    sources = [each.get(name, "") for each in root.iter() for name in ("src", "href", "srcset")]
    assert all(source.startswith("data:image/") for source in sources if source)
    assert "url(" not in text and "@import" not in text and not re.search(r"https?://", text)
    assert "default-src 'none'" in root.find("head/meta[2]").get("content")  # type: ignore[union-attr]


def test_it_can_be_read_without_eyes() -> None:
    root = parsed(page_of(record(), found=held_out(["x", "y"])))
    assert root.get("lang") == "en"
    for image in root.iter("img"):
        assert image.get("alt")
    for picture in root.iter("svg"):
        assert picture.get("aria-label") or picture.get("aria-hidden") == "true"
    tables = list(root.iter("table"))
    assert len(tables) >= 3
    for each in tables:
        assert each.findtext("caption")
        assert all(cell.get("scope") == "col" for cell in each.findall("thead/tr/th")[1:])
        assert all(row[0].tag == "th" and row[0].get("scope") == "row" for row in each.findall("tbody/tr"))


def test_the_figures_of_a_run() -> None:
    root = parsed(page_of(record()))
    cells = [cell.text for cell in root.find(".//table/tbody/tr")]  # type: ignore[union-attr]
    assert cells == ["run", "stopped", "5", "10 %", "75 %", "75 %", "1.0000", "–", "1 GiB"]
    titles = [figure.findtext("figcaption") for figure in root.iter("figure")]
    assert titles == ["Loss", "Accuracy (top-1)", "Learning rate", "Peak memory so far", "Drift (logarithmic)"]


def test_settings_that_differ() -> None:
    def state(**settings: Any) -> dict[str, Any]:
        return {"progress": {}, "settings": settings, "fingerprint": {"call": {"data": "digits"}}}

    runs = [record(str(i), run=state(lr=lr, batch_size=8, augment=lr > 1)) for i, lr in enumerate((0.5, 2.0))]
    text = page_of(*runs)
    (found,) = [t for t in parsed(text).iter("table") if "asked" in (t.findtext("caption") or "")]
    assert [[cell.text for cell in row] for row in found.findall("tbody/tr")] == [
        ["lr", "0.5", "2"],
        ["augment", "false", "true"],
    ]
    assert "None that the runs have saved" in page_of(record("a"), record("b"))


def test_a_state_that_says_odd_things_spoils_no_page() -> None:
    for odd in (3, [1], "x", {"a": "b"}):
        guard = {"allowed": odd, "moved_to_anchors": odd, "recalibrations": odd, "adjoints": {"layer1": odd}}
        run = {"progress": {"guard": guard}, "settings": {"lr": odd}, "fingerprint": {"call": odd, "images": odd}}
        assert "Backward pass" in page_of(record("a", run=run), record("b", run=run, recipe="finetune = 3"))


def test_confusions_of_many_classes_are_pairs() -> None:
    few, many = (page_of(record(), found=held_out([f"c{i}" for i in range(n)])) for n in (30, 31))
    assert "Confusion matrix" in few and "Confusion matrix" not in many
    assert "The commonest confusions among 31 classes" in many and "All 31 classes" in many


def test_runs_of_one_name_are_told_apart() -> None:
    assert run_names([Path("a/x"), Path("b/x"), Path("y")]) == ["a/x", "b/x", "y"]


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.1, 0.1), (0, 0), (-3, 7), (1e-9, 2e-9), (12, 13), (0, 1e12), (5, 5.0001), (-1, -1)]
)
def test_an_axis_holds_its_values_with_a_few_ticks(low: float, high: float) -> None:
    found = axis(low, high)
    assert found.low <= low and high <= found.high and found.low < found.high
    assert 2 <= len(found.ticks) <= 8 and (found.ticks[0], found.ticks[-1]) == (found.low, found.high)
    assert 0 <= found.share(low) <= found.share(high) <= 1


@pytest.mark.parametrize(("low", "high"), [(1e-7, 1e-1), (1, 1), (3, 4), (1e-30, 1e30), (0.001, 0.01)])
def test_a_logarithmic_axis_too(low: float, high: float) -> None:
    found = log_axis(low, high)
    assert -1e-9 <= found.share(low) <= found.share(high) <= 1 + 1e-9
    assert 2 <= len(found.ticks) <= 8


def test_a_long_curve_is_thinned_and_keeps_its_extremes() -> None:
    points = [(float(i), float(i % 7)) for i in range(20_000)]
    points[12_345] = (12_345.0, 99.0)
    points[777] = (777.0, -5.0)
    found = thinned(points)
    assert len(found) <= MOST + 4 and {points[12_345], points[777], points[0], points[-1]} <= set(found)
    assert [step for step, _ in found] == sorted(step for step, _ in found)
    assert thinned(points[:MOST]) == points[:MOST]


def test_a_curve_stands_where_its_values_are() -> None:
    made = plot("t", [Curve("a", [(0, 0.0), (10, 10.0)], 0)])
    assert made is not None
    path = ElementTree.fromstring(made).find(".//path")
    assert path is not None and path.get("d") == "M66 216L448 10"  # from the lower left corner to the upper right
    assert plot("t", [Curve("a", [], 0)]) is None
    assert plot("t", [Curve("a", [(0, 0.0)], 0)], logarithmic=True) is None
    made = plot("t", [Curve("a", [(0, 5.0), (10, 10.0)], 0)], from_zero=True)
    assert made is not None and "M66 113L448 10" in made


def test_pictures_are_small_copies() -> None:
    assert data_uri(Image.new("L", (8, 8))).startswith("data:image/png;base64,")
    large = data_uri(Image.effect_noise((4000, 3000), 80).convert("RGB"))
    assert large.startswith("data:image/jpeg;base64,") and len(large) < 60_000


def test_cells_are_escaped() -> None:
    assert EVIL not in table(EVIL, [EVIL, EVIL], [[EVIL, EVIL]])
