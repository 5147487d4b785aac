"""The page: whole, closed to other hosts, and in a browser usable by keyboard and at a phone's width."""

from __future__ import annotations

import base64
import hashlib
import re
import shlex
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest

from ldmrt.cli.generate import generate
from ldmrt.pipeline import Pipeline
from ldmrt.serving.http import Limits

from .conftest import PATIENCE, PROMPT, Served, Serving, running

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
KEY = "k" * 24


class Elements(HTMLParser):
    """What a page is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.labelled: list[str] = []
        self._labels = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        found = dict(attrs)
        if found.get("id"):
            self.ids.append(str(found["id"]))
        self._labels += tag == "label"
        if tag in ("input", "select", "textarea") and self._labels:
            self.labelled.append(str(found["id"]))

    def handle_endtag(self, tag: str) -> None:
        self._labels -= tag == "label"


@pytest.fixture
def text(served: Served) -> str:
    return served.client.get("/").text


def test_the_script_refers_to_elements_that_there_are(text: str) -> None:
    elements = Elements(text)
    assert len(elements.ids) == len(set(elements.ids))
    used = set(re.findall(r'\$\("([\w-]+)"\)', text))
    assert used <= set(elements.ids)
    styled = set(re.findall(r"#([a-z][\w-]*)[ .{\[]", text.partition("</style>")[0].partition("<style>")[2]))
    assert styled <= set(elements.ids)


def test_every_field_has_a_label(text: str) -> None:
    elements = Elements(text)
    fields = [tag for tag in elements.tags if tag in ("input", "select", "textarea")]
    assert len(elements.labelled) == len(fields) >= 10


def test_nothing_comes_from_elsewhere(text: str, served: Served) -> None:
    assert not re.findall(r"https?:|//[a-z]", text)
    assert not [name for name, _ in Elements(text).attributes if name.startswith("on") or name == "style"]
    policy = dict(
        part.strip().split(" ", 1) for part in served.client.get("/").headers["content-security-policy"].split(";")
    )
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert not {"unsafe-inline", "unsafe-eval", "*"} & set(re.findall(r"[\w*-]+", " ".join(policy.values())))
    for tag in ("script", "style"):
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        hashed = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{hashed}'"


def test_it_is_open_and_what_it_asks_for_is_not(serving: Serving) -> None:
    served = serving(keys=(KEY,))
    stranger = {"authorization": ""}
    assert served.client.get("/", headers=stranger).headers["content-type"] == "text/html; charset=utf-8"
    assert served.client.get("/v1/models", headers=stranger).status_code == 401
    assert KEY not in served.client.get("/").text


# ---------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    with sync_api.sync_playwright() as playwright:
        one = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield one
        one.close()


@pytest.fixture(scope="module")
def open_server() -> Iterator[Served]:
    with running(Pipeline.from_bundle(device="cpu"), (), Limits()) as one:
        yield one


@pytest.fixture
def page(browser: Any, open_server: Served) -> Iterator[Any]:
    """The page at a phone's width, which says nothing on its console and asks nobody else."""
    context = browser.new_context(viewport={"width": 375, "height": 740})
    one = context.new_page()
    said: list[str] = []
    one.on("console", lambda message: said.append(message.text))
    one.on("pageerror", lambda error: said.append(str(error)))
    asked: list[str] = []
    one.on("request", lambda request: asked.append(request.url))
    one.goto(open_server.url)
    says(one, "#model", "shapes")
    yield one
    assert not [text for text in said if "status of 400" not in text]  # which Chromium tells of itself
    assert all(url.startswith((open_server.url, "data:", "blob:")) for url in asked)
    context.close()


def says(page: Any, selector: str, word: str) -> None:
    """Wait until an element's text begins with a word. (A function that is waited for is a string to the page, which its policy refuses.)"""
    from playwright.sync_api import expect

    expect(page.locator(selector)).to_have_text(re.compile(f"^{re.escape(word)}"), timeout=1000 * PATIENCE)


def finished(page: Any, word: str = "Done") -> None:
    says(page, "#status", word)


@pytest.mark.browser
def test_a_picture_by_keyboard_alone(page: Any) -> None:
    page.evaluate(
        "window.shown = []; new MutationObserver(() => window.shown.push(document.querySelector('#picture').alt))"
        ".observe(document.querySelector('#picture'), {attributes: true, attributeFilter: ['alt']})"
    )
    page.keyboard.type(PROMPT)  # the prompt has the focus
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.type("8")
    for _ in range(4):
        page.keyboard.press("Tab")
    page.keyboard.type("3")
    page.keyboard.press("Control+Enter")
    finished(page)
    assert any(alt.startswith("On its way") for alt in page.evaluate("window.shown"))
    assert page.locator("#used-seed").inner_text() == "3"
    assert page.locator("#gallery button").count() == 1
    page.locator("#gallery button").focus()
    page.keyboard.press("Enter")
    assert page.locator("#picture").get_attribute("alt") == PROMPT


@pytest.mark.browser
def test_the_command_makes_the_picture_again(page: Any) -> None:
    page.fill("#prompt", "a 'red' circle; $HOME `x` \"y\"")
    page.fill("#negative", "it's blue")
    page.fill("#steps", "2")
    page.press("#prompt", "Control+Enter")
    finished(page)
    words = shlex.split(page.locator("#command").inner_text())
    assert words[:3] == ["ldmrt", "generate", "a 'red' circle; $HOME `x` \"y\""]
    flags = dict(zip(words[3::2], words[4::2], strict=True))
    seed = page.locator("#used-seed").inner_text()
    assert flags == {
        "--negative-prompt": "it's blue",
        "--steps": "2",
        "--guidance-scale": "5",
        "--sampler": "ddim",
        "--size": "128x128",
        "--seed": seed,
    }
    known = {f"--{name.replace('_', '-')}" for name in generate.__annotations__}
    assert set(flags) <= known


@pytest.mark.browser
def test_several_pictures_and_those_of_before(page: Any) -> None:
    page.fill("#steps", "2")
    page.fill("#seed", "5")
    page.fill("#count", "2")
    page.fill("#prompt", PROMPT)
    page.click("#draw")
    finished(page, "Done: 2")
    assert page.locator("#gallery button").count() == 2
    page.click("#gallery button >> nth=1")
    assert page.locator("#used-seed").inner_text() == "5"
    assert page.locator("#gallery button >> nth=1").get_attribute("aria-pressed") == "true"


@pytest.mark.browser
def test_stopping_withdraws_the_request(page: Any, open_server: Served) -> None:
    before = open_server.batcher.stats().cancelled
    page.fill("#prompt", PROMPT)
    page.fill("#steps", "150")
    page.click("#draw")
    finished(page, "Drawing")
    page.keyboard.press("Escape")
    finished(page, "Stopped")
    open_server.until(lambda: open_server.batcher.stats().cancelled == before + 1)


@pytest.mark.browser
def test_what_the_server_refuses_is_said(page: Any, open_server: Served) -> None:
    page.fill("#prompt", "x" * 5000)
    page.click("#draw")
    finished(page, "prompt asks for 5000 characters")
    assert page.locator("#status").get_attribute("class") == "bad"


@pytest.mark.browser
@pytest.mark.parametrize("width", [320, 375, 1280])
def test_nothing_is_wider_than_the_window(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 740})
    page.fill("#prompt", "unbreakable" * 60)
    page.fill("#steps", "1")
    page.click("#draw")
    finished(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    small = "[...document.querySelectorAll('input, select, button')].filter(e => e.offsetHeight && e.offsetHeight < 32).length"
    assert page.evaluate(small) == 0


@pytest.mark.browser
def test_a_key_is_asked_for(browser: Any, serving: Serving) -> None:
    served = serving(keys=(KEY,))
    page = browser.new_page()
    page.goto(served.url)
    page.wait_for_selector("#key", state="visible")
    page.keyboard.type(KEY)
    page.keyboard.press("Tab")
    says(page, "#model", "shapes")
    page.fill("#prompt", PROMPT)
    page.fill("#steps", "1")
    page.click("#draw")
    finished(page)
    page.close()
