"""The report as a browser shows it."""

import json
import re
import shutil
import subprocess

import pytest

import reftlab as rl
from reftlab.explaining import explain
from reftlab.explaining.section import QUESTIONS
from tests.explaining.conftest import PAIRS, bound, loreft

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LOOK = """<script>addEventListener("load", () => {
  const shown = e => e.getClientRects().length > 0;
  document.body.innerHTML = JSON.stringify({
    headings: [...document.querySelectorAll("h2, h3")].filter(shown).map(e => e.textContent.trim()),
    sections: [...document.querySelectorAll("section")].map(e => e.id),
    images: [...document.images].map(e => e.naturalWidth),
    overflow: document.documentElement.scrollWidth - innerWidth,
  });
});</script></body>"""


def opened(page, folder, width):
    """What a browser of some width makes of a page: its headings, sections, images, and sideways overflow."""
    copy = folder / "looked_at.html"
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", LOOK), encoding="utf-8")
    command = [
        BROWSER,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder / 'user'}",
    ]
    command += ["--virtual-time-budget=20000", f"--window-size={width},900", "--dump-dom", copy.as_uri()]
    dumped = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    return json.loads(re.search(r"<body>(.*)</body>", dumped, re.DOTALL)[1])


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine")
def test_a_browser_finds_every_section_in_the_order_in_which_a_reader_asks(
    small_llama, byte_tokenizer, tmp_path
):
    steer = rl.Edit("steer", at="blocks[1].output", positions="last", intervention=rl.Add(0.5))
    reft = bound(small_llama, byte_tokenizer, loreft("shift", "blocks[0].output"), steer)
    found = explain(reft, PAIRS, chat=False, runs=8, max_new_tokens=3, progress=False)
    page = found.save(tmp_path / "report.html")
    for width in (1200, 500):
        seen = opened(page, tmp_path, width)
        asked = [heading for heading in seen["headings"] if heading in QUESTIONS.values()]
        assert asked == list(QUESTIONS.values())
        assert {"replies", "edits", "overview", "removal", "limits"} <= set(seen["sections"])
        asked_for = {section.name for section in found.sections if section.applies}
        assert asked_for == {section.name for section in found.sections} & set(seen["sections"])
        for section in found.sections:
            assert (section.title in seen["headings"]) == section.applies
        assert len(seen["images"]) > 5
        assert min(seen["images"]) > 100
        assert seen["overflow"] <= 0
