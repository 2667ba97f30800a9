"""report.html in a real browser, at a desktop's and a phone's width, light and dark."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from dougong_compat.cases import collect_profile
from dougong_compat.report.write import write_all
from dougong_compat.selftest.sample import sample_report

playwright = pytest.importorskip("playwright.sync_api")

pytestmark = [pytest.mark.prove, pytest.mark.timeout(120), pytest.mark.xdist_group("browser")]

PERFORMANCE = [
    {"name": "ceiling: copy", "share": None, "achieved": "11.0 GB/s", "ceiling": ""},
    {"name": "decode 131072 h8k2", "share": 0.83, "microseconds": 12345.6, "achieved": "9.1 GB/s, 33.4 GFLOP/s",
     "ceiling": "memory"},
    {"name": "prefill 1024", "share": None, "message": "no kernel for blocks of 64 tokens, and none that would do"},
]  # fmt: skip
NEEDS = {case.id: case.needs for case in collect_profile("smoke")}


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    found = os.environ.get("DOUGONG_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.fail("there is no Chromium: scripts/install_browser.sh installs it, or says what to do")
    # Chromium's own sandbox cannot be had by root; the page is ours.
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.mark.parametrize(("width", "height"), [(1280, 860), (390, 844)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_and_asks_for_nothing(
    browser: object, width: int, height: int, scheme: str, tmp_path: Path
) -> None:
    report = sample_report(bad=2, not_run=9)
    report["performance"] = PERFORMANCE
    write_all(report, tmp_path, NEEDS)
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)  # type: ignore[attr-defined]
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda one: complaints.append(one.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda one: None if one.url.startswith("file:") else complaints.append(one.url))
    page.goto((tmp_path / "report.html").as_uri())
    assert page.title() == "mydev: invalid (smoke)"
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing is cut off at the side"
    assert page.locator(".fail").count() == 2 and page.locator(".fail pre").first.is_visible()
    assert page.locator(".tile", has_text="not run").locator("b").inner_text() == "9"
    assert page.locator("h2", has_text="Capabilities").is_visible() and page.locator("figure svg").first.is_visible()
    share = page.locator("td", has_text="83%").bounding_box()
    assert share["x"] + share["width"] <= width, "the share of the ceiling is what the table is for"
    ground, text = (page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color"))
    bright = [sum(int(part) for part in value[4:-1].split(",")) for value in (ground, text)]
    assert (bright[0] > bright[1]) is (scheme == "light"), (ground, text)
    context.close()
    assert complaints == []
