"""The page in a real browser, where there is one: every picture is there, and the console has nothing to say."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from datetime import datetime
from pathlib import Path

import pytest
from PIL import Image
from small_pages import EVIL, held_out, record

from resode_cli.reports.html.page import page

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
pytestmark = pytest.mark.skipif(not BROWSER, reason="no Chromium here")

# Asked from outside the page, whose own policy lets no script run: a frame of the same origin is looked into.
PROBE = """<!doctype html><meta charset="utf-8"><title>probe</title><body><iframe id="page" src="page.html"
style="width:{width}px;height:800px;border:0"></iframe><script>
document.getElementById("page").onload = event => {{
  const inside = event.target.contentDocument, root = inside.documentElement
  const pictures = [...inside.images].map(image => image.naturalWidth)
  const text = getComputedStyle(inside.body)
  document.title = JSON.stringify({{pictures, over: root.scrollWidth - root.clientWidth, scripts: inside.scripts.length,
    svgs: [...inside.querySelectorAll(".plots svg:not(.swatch)")].map(svg => svg.getBoundingClientRect().width)}})
}}</script></body>"""


def browse(address: str, tmp_path: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--allow-file-access-from-files", *more, address]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    found = held_out([EVIL, "kea", "a long name of a class that has to go somewhere", "owl"])
    text = page([record("a"), record("b")], [found, found], now=datetime(2026, 1, 2))
    (folder / "page.html").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("width", [1200, 360])
def test_everything_is_there_and_nothing_is_wider_than_the_page(width: int, written: Path, tmp_path: Path) -> None:
    (written / "probe.html").write_text(PROBE.format(width=width), encoding="utf-8")
    done = browse(f"file://{written}/probe.html", tmp_path, "--dump-dom", "--virtual-time-budget=5000")
    (title,) = re.findall("<title>(.*?)</title>", done.stdout)
    found = json.loads(title.replace("&quot;", '"'))
    assert len(found["pictures"]) == 6 and all(size > 0 for size in found["pictures"])
    assert (found["over"], found["scripts"]) == (0, 0)
    assert len(found["svgs"]) >= 5 and all(250 < size <= width for size in found["svgs"])


@pytest.mark.parametrize("dark", [False, True])
def test_the_console_is_silent_and_the_ground_follows_the_scheme(dark: bool, written: Path, tmp_path: Path) -> None:
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    shot = tmp_path / "page.png"
    done = browse(f"file://{written}/page.html", tmp_path, f"--screenshot={shot}", "--window-size=900,1200", *scheme)
    assert "CONSOLE" not in done.stderr, done.stderr
    with Image.open(shot) as picture:
        ground = picture.convert("RGB").getpixel((2, 2))
        assert (max(ground) < 60) is dark and (min(ground) > 200) is not dark  # type: ignore[arg-type,type-var]
