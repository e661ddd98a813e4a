"""The page at `/` in a real browser: headless Chromium, where there is one."""

import asyncio
import re
import shutil
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest

from tests.server.serving import FakeBackend, Served, serving

sync_api: Any = pytest.importorskip("playwright.sync_api", reason="Playwright is an extra")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
expect = sync_api.expect
expect.set_options(timeout=20_000)
KEY = "key-of-the-operator"
HOSTILE = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script>"


class Group:
    """Says what an orchestrator says; its state and its events are the test's."""

    def __init__(self) -> None:
        self.state, self.width, self.is_watched = "ready", 2, True
        self.events: list[dict[str, Any]] = []

    def event(self, kind: str, severity: str, message: str) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        self.events.append({"time": now, "kind": kind, "severity": severity, "rank": None, "message": message})

    def status(self) -> dict[str, Any]:
        ranks = [
            {"rank": rank, "slot": rank, "pid": 70 + rank, "phase": "serving", "done": 1234, "silent_seconds": 0.01,
             "memory_bytes": 3 << 20, "collective_bytes": 5 << 10}
            for rank in range(2)
        ]  # fmt: skip
        return {
            "state": self.state, "width": 2, "configured_width": 2, "generation": 1, "faults": 0, "excluded": {},
            "failure": None, "health": {"ranks": ranks if self.state == "ready" else []}, "events": list(self.events),
        }  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        # A container's user is often root, whom Chromium gives no sandbox; it opens this test's own page only.
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def served(fake: FakeBackend) -> Iterator[Served]:
    with serving(fake, api_keys=(KEY,)) as found:
        yield found


@pytest.fixture
def page(browser: Any, served: Served) -> Iterator[Any]:
    made = browser.new_page()
    problems: list[str] = []
    made.on("pageerror", lambda error: problems.append(str(error)))
    made.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    made.on("request", lambda request: problems.append(request.url) if not request.url.startswith(served.url) else None)
    made.goto(served.url)
    yield made
    assert made.title() == "ryzanstein"
    made.close()
    # The browser itself tells of every status above 399; anything else, such as a broken policy, is a defect.
    assert [text for text in problems if "Failed to load resource" not in text and not text.startswith("data:")] == []


def sign_in(page: Any) -> None:
    page.get_by_label("API key").fill(KEY)
    page.get_by_role("button", name="Continue").click()
    expect(page.locator("#status")).to_have_text("ready")


def test_it_asks_for_the_key_and_keeps_it_in_this_tab_only(page, served, browser):
    expect(page.get_by_role("dialog")).to_be_visible()
    page.get_by_label("API key").fill("a wrong ключ")
    page.get_by_role("button", name="Continue").click()
    expect(page.locator("#key-problem")).to_have_text("The server does not take that key.")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_visible()
    sign_in(page)
    page.reload()
    expect(page.locator("#status")).to_have_text("ready")
    expect(page.get_by_role("dialog")).to_be_hidden()
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""] and KEY not in page.content()
    other = browser.new_page()
    other.goto(served.url)
    expect(other.get_by_role("dialog")).to_be_visible()
    other.close()


def test_it_shows_the_engine_and_streams_a_chat(page, fake):
    async def act(step: int) -> None:
        await asyncio.sleep(0.01)

    fake.act = act
    sign_in(page)
    expect(page.locator("#model")).to_have_text("tiny")
    expect(page.locator("#group")).to_contain_text("2 x fake (none) · float32")
    expect(page.locator("#ranks tr")).to_have_count(2)
    page.get_by_label("Message").fill("<i>Hi</i>")
    page.keyboard.press("Enter")
    expect(page.locator(".message[data-role=user] .said")).to_have_text("<i>Hi</i>")
    answer = page.locator(".message[data-role=assistant] .said")
    expect(answer).to_contain_text("ABC")
    expect(page.locator("#progress")).to_contain_text("64 tokens, first after")
    begun = "".join(chr(32 + (33 + step) % 90) for step in range(64))
    assert answer.text_content() == begun
    expect(page.locator("#tokens-chart path.a")).to_have_attribute(
        "d", re.compile(r"^M[\d.]+ [\d.]+(L[\d.]+ [\d.]+)+$")
    )
    expect(page.locator("#pages-now")).to_have_text("0 of 100")
    page.get_by_role("button", name="Clear").click()
    expect(page.locator(".message")).to_have_count(0)


def test_it_shows_a_recovery_as_it_happens(page, fake):
    group = fake.orchestrator = Group()
    go_on = False

    async def act(step: int) -> None:
        while step == 9 and not go_on:
            await asyncio.sleep(0.01)

    fake.act = act
    group.event("ready", "info", "2 of 2 devices serve")
    sign_in(page)
    expect(page.locator("#ranks tr")).to_have_count(2)
    expect(page.locator("#ranks tr").first).to_contain_text("3.0 MiB")
    page.get_by_label("Message").fill("Hello")
    page.keyboard.press("Enter")
    answer = page.locator(".message[data-role=assistant] .said")
    expect(answer).to_have_text("ABCDEFGHI")
    group.state = "recovering"
    group.event("fault", "error", f"rank 1 died {HOSTILE}")
    expect(page.locator("#status")).to_have_text("recovering")
    expect(page.locator("#events")).to_contain_text("rank 1 died <img")
    expect(page.locator("#events li[data-severity=error] .kind")).to_have_text("fault")
    expect(page.locator("#progress")).to_contain_text("devices are being replaced")
    expect(page.locator("#ranks")).to_contain_text("being replaced")
    expect(page.locator("#tokens-chart rect").first).to_be_attached()
    group.state, go_on = "ready", True
    group.event("recovered", "info", "they go on")
    expect(page.locator("#status")).to_have_text("ready")
    expect(page.locator("#progress")).to_contain_text("longest pause")
    expect(page.locator("#ranks tr")).to_have_count(2)
    assert answer.text_content().startswith("ABCDEFGHIJKLM") and page.locator(".message[data-role=error]").count() == 0


def test_a_stopped_answer_and_a_server_that_is_gone(page, fake, served):
    async def act(step: int) -> None:
        while step == 3:
            await asyncio.sleep(0.01)

    fake.act = act
    sign_in(page)
    page.get_by_label("Message").fill("Hello")
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".message[data-role=assistant] .said")).to_have_text("ABC")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#progress")).to_contain_text("stopped")
    deadline = time.monotonic() + 10
    while fake.active and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not fake.active, "the engine no longer works for it"
    fake.is_alive = False
    expect(page.locator("#status")).to_have_text("failed")
    page.get_by_label("Message").fill("Hello again")
    page.keyboard.press("Enter")
    expect(page.locator(".message[data-role=error] .said")).to_have_text("The engine has failed.")
