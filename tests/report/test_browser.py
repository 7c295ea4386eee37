"""The page in a real browser: headless Chromium draws it, and the pictures stay to be looked at.

They go to ``build/test-artefacts/report`` or the folder that MEGACPT_ARTEFACTS names. Without a Chromium on the path
these tests are skipped, and say so.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from html import escape, unescape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megacpt.report import write_report

ROOT = Path(__file__).parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PHONE = 390  # pixels
GROUND = {"light": (255, 255, 255), "dark": (20, 23, 28)}

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: nobody has looked at the page of the report"),
    pytest.mark.xdist_group("chromium"),
]
Browse = Callable[..., str]

# Runs in a page that holds the report in a frame as wide as a phone: how wide the report is there, which words of a
# figure stick out of it, and how tall the letters of figures and tables come out.
LOOK = """
const frame = document.querySelector("iframe");
frame.onload = () => {
  const page = frame.contentDocument, found = {};
  const shown = [...page.querySelectorAll("figure > svg")].filter(svg => svg.getBoundingClientRect().width > 0);
  found.width = page.documentElement.scrollWidth;
  found.figures = shown.map(svg => svg.getAttribute("class"));
  found.outside = shown.flatMap(svg => [...svg.querySelectorAll("text")].filter(text => {
    const a = text.getBoundingClientRect(), b = svg.getBoundingClientRect();
    return a.left < b.left - 3 || a.right > b.right + 3 || a.top < b.top - 3 || a.bottom > b.bottom + 3;
  }).map(text => text.textContent));
  const letters = shown.flatMap(svg => [...svg.querySelectorAll("text")]).map(t => t.getBoundingClientRect().height);
  found.letters = Math.min(...letters);
  document.body.append(Object.assign(document.createElement("pre"), {textContent: JSON.stringify(found)}));
};
frame.srcdoc = SOURCE;
"""


@pytest.fixture(scope="module")
def page(saga: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("browser") / "report.html"
    compare = {"replay 0 %": [saga["python-0"]]}
    return write_report([saga["release"], saga["c-release"]], out, compare=compare, label="replay 25 %")


@pytest.fixture(scope="module")
def artefacts() -> Path:
    folder = Path(os.environ.get("MEGACPT_ARTEFACTS", ROOT / "build" / "test-artefacts")) / "report"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def browse(tmp_path: Path) -> Browse:
    """Let Chromium open a page and do what its flags say; its output."""

    def run(page: Path, *flags: str) -> str:
        assert CHROMIUM is not None
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += ["--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}"]
        done = subprocess.run(
            [*command, *flags, page.as_uri()], capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    return run


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_page_is_drawn_in_both_themes(theme: str, page: Path, artefacts: Path, browse: Browse) -> None:
    picture = artefacts / f"report-{theme}.png"
    picture.unlink(missing_ok=True)
    flags = ["--blink-settings=preferredColorScheme=0"] if theme == "dark" else []
    browse(page, f"--screenshot={picture}", "--window-size=1200,6400", *flags)
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    assert pixels.shape == (6400, 1200, 3)
    ground = np.array(GROUND[theme])
    assert (pixels[0, 0] == ground).all()
    inked = (np.abs(pixels - ground).sum(axis=2) > 60).mean(axis=1)  # of each row
    assert 0.05 < inked.mean() < 0.5
    assert (inked[:5500].reshape(-1, 250).max(axis=1) > 0.02).all()  # no screen of it is blank


def test_the_page_fits_a_phone(page: Path, artefacts: Path, browse: Browse) -> None:
    frame = artefacts / "phone.html"
    source = json.dumps(page.read_text(encoding="utf-8")).replace("</", "<\\/")
    style = f"border: 0; width: {PHONE}px; height: 9600px"
    frame.write_text(
        f'<body style="margin: 0"><iframe style="{escape(style)}"></iframe>'
        f"<script>{LOOK.replace('SOURCE', source)}</script>",
        encoding="utf-8",
    )
    picture = artefacts / "report-phone.png"
    browse(frame, f"--screenshot={picture}", "--window-size=600,9600")
    with Image.open(picture) as image:
        image.crop((0, 0, PHONE, 9600)).save(picture)
    text = browse(frame, "--dump-dom", "--window-size=600,9600")
    frame.unlink()
    found = json.loads(unescape(re.findall(r"<pre>(.*?)</pre>", text, flags=re.DOTALL)[-1]))
    assert found["width"] == PHONE  # nothing makes the page itself scroll sideways
    assert found["figures"] == ["narrow"] * 4
    assert found["outside"] == []
    assert found["letters"] >= 9


def test_the_page_prints(page: Path, artefacts: Path, browse: Browse) -> None:
    printed = artefacts / "report.pdf"
    printed.unlink(missing_ok=True)
    browse(page, f"--print-to-pdf={printed}", "--no-pdf-header-footer")
    content = printed.read_bytes()
    assert content.startswith(b"%PDF")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", content)) <= 12
