"""The page in a real browser, over a real server with a real model."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from server_harness import Served, served

pytestmark = [pytest.mark.prove, pytest.mark.timeout(300), pytest.mark.xdist_group("browser")]

Open = Callable[..., Page]

# A model on one busy core answers slowly; nothing here is about its speed.
expect.set_options(timeout=60_000)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = os.environ.get("DOUGONG_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.fail("there is no Chromium: scripts/install_browser.sh installs it, or says what to do")
    # Chromium's own sandbox cannot be had by root; the pages are ours.
    options = ["--no-sandbox", "--disable-gpu"]
    with sync_playwright() as play, play.chromium.launch(executable_path=found, args=options) as browser:
        yield browser


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served("smollm2-135m", {"max_num_seqs": 4}) as server:
        yield server


@pytest.fixture
def open_page(browser: Browser, server: Served) -> Iterator[Open]:
    """Opens the page in a browser of its own; whatever it complains of fails the test."""
    complaints: list[str] = []
    contexts = []

    def open_page(
        path: str = "/", *, width: int = 1280, height: int = 860, url: str = server.url, **options: Any
    ) -> Page:
        context = browser.new_context(viewport={"width": width, "height": height}, locale="en-US", **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda one: complaints.append(one.text) if one.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda one: None if one.url.startswith(url) else complaints.append(f"asked for {one.url}"))
        page.goto(url + path)
        return page

    yield open_page
    for context in contexts:
        context.close()
    server.wait_idle()
    # A browser reports an answer of 400 or 401 as an error of its own; two tests ask for one.
    assert [text for text in complaints if "responded with a status of 40" not in text] == []


def ask(page: Page, text: str, tokens: int = 400) -> None:
    """Set the longest answer and send."""
    expect(page.locator("#set-model")).not_to_have_value("")
    # On a phone the field is in a drawer: set it as the field would.
    page.evaluate("n => { const f = document.getElementById('set-max_tokens'); f.value = n; }", tokens)
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def answer_length(page: Page) -> int:
    return int(page.evaluate("document.querySelector('.turn.assistant:last-of-type .body')?.textContent.length ?? 0"))


def wait_for_text(page: Page, more_than: int = 0) -> int:
    page.wait_for_function(
        "n => (document.querySelector('.turn.assistant:last-of-type .body')?.textContent.length ?? 0) > n",
        arg=more_than,
    )
    return answer_length(page)


def test_an_answer_streams_and_is_kept(open_page: Open) -> None:
    page = open_page()
    expect(page.locator("#bar-model")).to_have_text("tiny")
    ask(page, "Write four sentences about bridges.", 60)
    expect(page.locator("#stop")).to_be_visible()
    first = wait_for_text(page)
    assert wait_for_text(page, first) > first, "it did not grow"
    expect(page.locator("#send")).to_be_visible()
    meta = page.locator(".turn.assistant .meta")
    expect(meta).to_contain_text("tokens/s")
    expect(meta).to_contain_text("first after")
    page.get_by_role("button", name="JSON", exact=True).click()
    expect(page.locator(".raw").first).to_contain_text('"max_tokens": 60')
    said = page.locator(".turn.assistant .body").inner_text()
    page.reload()
    page.locator("#history-list .open").first.click()
    assert page.locator(".turn.assistant .body").inner_text() == said
    page.once("dialog", lambda dialog: dialog.accept())
    page.click("#clear-history")
    expect(page.locator("#history-list li")).to_have_count(0)


@pytest.mark.parametrize("how", ["button", "escape", "leave"])
def test_stopping_frees_the_engine(open_page: Open, server: Served, how: str) -> None:
    page = open_page()
    ask(page, "Count from one to one thousand in words.", 1500)
    wait_for_text(page)
    assert server.client.num_completions == 1
    if how == "button":
        page.click("#stop")
    elif how == "escape":
        page.keyboard.press("Escape")
    else:
        page.close()
    server.wait_idle(10)
    if how != "leave":
        expect(page.locator(".turn.assistant .meta")).to_contain_text("stopped by you")
        expect(page.locator("#send")).to_be_visible()


def test_the_live_view_follows_a_request(open_page: Open, server: Served) -> None:
    page = open_page("/#engine")
    map_of = "document.querySelector('#kv-groups canvas')?.toDataURL() ?? ''"
    # A function: Playwright evaluates another expression anew in every frame, which the page's policy forbids.
    page.wait_for_function(f"() => ({map_of}).length > 500")
    before = page.evaluate(map_of)
    expect(page.locator("#figure-running .value")).to_have_text("0/ 4")
    chat = page.context.new_page()
    chat.set_default_timeout(60_000)
    chat.goto(server.url)
    ask(chat, "Describe a long journey.", 300)
    wait_for_text(chat)
    page.bring_to_front()
    expect(page.locator("#figure-running .value")).to_have_text("1/ 4")
    expect(page.locator("#request-note")).to_have_text("1 running, 0 waiting")
    page.locator(".lines summary").click()
    expect(page.locator("#request-table tbody tr")).to_have_count(1)
    assert float(page.locator("#figure-tokens .value").inner_text()) > 0
    page.wait_for_function(f"old => ({map_of}) !== old", arg=before)
    held = page.evaluate(map_of)
    page.wait_for_function(f"old => ({map_of}) !== old", arg=held)  # it grows
    expect(page.locator("#step-note")).to_contain_text("host's share")
    chat.evaluate("document.getElementById('stop').click()")
    page.bring_to_front()
    expect(page.locator("#figure-running .value")).to_have_text("0/ 4")
    kernels = page.locator(".kernel")
    assert kernels.count() >= 5
    refused = page.locator("details.kernel").first
    refused.locator("summary").click()
    assert len(refused.locator("dd").first.inner_text()) > 10, "a refusal has a reason"


def test_nobody_watches_a_hidden_page(open_page: Open, server: Served) -> None:
    page = open_page("/#engine")
    expect(page.locator("#figure-running .value")).to_have_text("0/ 4")
    with page.expect_event("requestfailed", lambda one: one.url.endswith("/web/live")):
        page.click("#tab-chat")


def contrast(page: Page, ink: str, paper: str) -> float:
    return float(
        page.evaluate(
            """([ink, paper]) => {
              const light = (name) => {
                const probe = document.body.appendChild(document.createElement("i"));
                probe.style.color = `var(--${name})`;
                const [r, g, b] = getComputedStyle(probe).color.match(/[\\d.]+/g).map((part) => {
                  const share = part / 255;
                  return share <= 0.03928 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
                });
                probe.remove();
                return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
              };
              const [a, b] = [light(ink), light(paper)];
              return Math.max(a, b) / Math.min(a, b);
            }""",
            [ink, paper],
        )
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_themes_can_be_read(open_page: Open, scheme: str) -> None:
    page = open_page(color_scheme=scheme)
    pairs = "ink paper, ink sheet, ink wash, soft paper, soft sheet, soft sunk, accent paper, accent-ink accent"
    for ink, paper in (pair.split() for pair in f"{pairs}, bad bad-wash".split(", ")):
        assert contrast(page, ink, paper) >= 4.5, f"{ink} on {paper}, {scheme}"
    background = "getComputedStyle(document.body).backgroundColor"
    by_system = page.evaluate(background)
    page.click("#theme")
    page.click("#theme")  # auto, light, dark
    dark = page.evaluate(background)
    assert (dark == by_system) is (scheme == "dark")
    page.reload()
    assert page.evaluate(background) == dark


@pytest.mark.parametrize("width", [320, 390, 768])
def test_a_phone_needs_no_sideways_scrolling(open_page: Open, width: int) -> None:
    page = open_page(width=width, height=720, is_mobile=True, has_touch=True, device_scale_factor=2)
    sideways = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(sideways) == 0
    ask(page, "Show `a_very_long_word_" + "x" * 120 + "` and a table.", 40)
    wait_for_text(page)
    expect(page.locator("#send")).to_be_visible()
    assert page.evaluate(sideways) == 0
    page.tap("#toggle-settings")
    expect(page.locator("#set-system")).to_be_in_viewport()
    page.keyboard.press("Escape")
    expect(page.locator("#settings")).to_be_hidden()
    page.tap("#tab-engine")
    expect(page.locator("#figure-running .value")).to_contain_text("/ 4")
    assert page.evaluate(sideways) == 0


def test_the_keyboard_is_enough_and_names_are_given(open_page: Open) -> None:
    page = open_page()
    page.focus(".skip")
    expect(page.locator(".skip")).to_be_in_viewport()
    page.focus("#tab-chat")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tab-engine"
    expect(page.locator("#view-engine")).to_be_visible()
    page.keyboard.press("Home")
    expect(page.locator("#view-chat")).to_be_visible()
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "prompt"
    nameless = page.evaluate(
        """[...document.querySelectorAll("button, input, select, textarea, canvas[role=img]")]
             .filter((one) => !one.closest("[hidden]"))
             .filter((one) => !(one.ariaLabel || one.labels?.length || one.textContent.trim()))
             .map((one) => one.outerHTML.slice(0, 80))"""
    )
    assert nameless == []


def test_chinese(open_page: Open) -> None:
    page = open_page()
    page.click("#language")
    expect(page.locator("#tab-engine")).to_have_text("引擎")
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
    assert page.get_attribute("#prompt", "placeholder") == "想问什么都可以"
    page.reload()
    expect(page.locator("#tab-chat")).to_have_text("对话")


def test_an_answer_cannot_become_a_program(open_page: Open) -> None:
    page = open_page()
    found = page.evaluate(
        """async () => {
          const { renderMarkdown } = await import("/web/markdown.js");
          const box = document.createElement("div");
          renderMarkdown(box, [
            "<img src=x onerror=alert(1)> <script>alert(1)</script>", "[a](javascript:alert(1)) [b](data:text/html,x)",
            "![picture](https://elsewhere.example/x.png)", "[good](https://example.com/a_(b)) and **bold *both***",
            "- one\\n  - two\\n\\n- three", "| a | b |\\n|---|:-:|\\n| `x|y` | 2 |", "```js\\n<b>\\n```", "1. a\\n2. b",
          ].join("\\n\\n"));
          return { tags: [...new Set([...box.querySelectorAll("*")].map((one) => one.tagName))],
                   links: [...box.querySelectorAll("a")].map((one) => one.getAttribute("href")),
                   lists: box.querySelectorAll("ul ul li").length, top: box.querySelector("ul").children.length,
                   code: box.querySelector("pre code").textContent, text: box.textContent };
        }"""
    )
    assert not {"IMG", "SCRIPT", "IFRAME"} & set(found["tags"])
    assert found["links"] == ["https://elsewhere.example/x.png", "https://example.com/a_(b)"]
    assert found["lists"] == 1 and found["top"] == 2 and found["code"] == "<b>"
    assert "<script>alert(1)</script>" in found["text"] and "[a](javascript:alert(1))" in found["text"]


def test_a_wrong_setting_is_shown_where_it_is(open_page: Open, server: Served) -> None:
    page = open_page()
    page.fill("#set-tools", '{"not": "a list"}')
    ask(page, "hello", 5)
    expect(page.locator("#settings-error")).to_contain_text("must be a JSON list")
    assert page.evaluate("document.activeElement.id") == "set-tools"
    assert server.client.num_completions == 0 and page.input_value("#prompt") == "hello"
    page.fill("#set-tools", "")
    page.fill("#set-seed", "-1")
    page.evaluate("document.getElementById('set-max_tokens').value = 0")
    page.press("#prompt", "Enter")
    expect(page.locator(".fault")).to_contain_text("max_tokens")


def test_a_key_is_asked_for_and_kept_for_the_tab_only(open_page: Open, tiny_model: Path) -> None:
    with served(tiny_model, api_key=("sk-right",)) as guarded:
        page = open_page(url=guarded.url)
        expect(page.locator("#key-dialog")).to_be_visible()
        page.fill("#key", "sk-right")
        page.press("#key", "Enter")
        expect(page.locator("#bar-model")).to_have_text("tiny")
        page.click("#tab-engine")
        expect(page.locator("#figure-running .value")).to_contain_text("/ 16")
        assert page.evaluate("Object.values(localStorage).join()").find("sk-right") < 0
        page.reload()
        expect(page.locator("#figure-running .value")).to_contain_text("/ 16")
        page.close()
        time.sleep(0.1)
