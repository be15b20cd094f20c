"""The page of a server in a real browser: it shows the canvas as it is written, and loads nothing from elsewhere."""

import dataclasses
import pathlib
import shutil
import urllib.request

import live_server
import pytest

from diffusion_t5x.decoding.sundae import SundaeDecoder

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PROMPT = "Once upon a time"


def test_the_page_is_whole_and_lets_no_other_script_run(url):
    answer = urllib.request.urlopen(url)
    html, policy = answer.read().decode(), answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "'sha256-" in policy
    assert "://" not in html and html.count("<script") == 2 and "AutoregressiveDecoder" in html
    assert answer.headers["Content-Type"].startswith("text/html")


@pytest.fixture
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("no chromium on the PATH (Debian: apt install chromium)")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def test_the_page_shows_the_canvas_as_it_is_written(stories, browser, tmp_path):
    decoder = SundaeDecoder(num_steps=5, num_samples=1)
    trained_otherwise = dataclasses.replace(stories, allow_mismatch=True)
    with live_server.live(live_server.loaded(stories, decoder), api_key="secret") as url:
        page = browser.new_page()
        wrong, canvases = [], []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.goto(url)
        page.evaluate("""() => {
          window.canvases = [];
          const cells = () => [...document.querySelectorAll("#canvas .cell")].map((cell) => cell.textContent);
          const note = () => window.canvases.push(cells());
          new MutationObserver(note).observe(document.getElementById("canvas"), {childList: true, subtree: true});
        }""")
        page.fill("#prompt", PROMPT)
        page.click("#send")
        page.wait_for_selector("#wrong:not(:empty)")
        assert "The API key is missing or wrong" in page.inner_text("#wrong")
        assert len(wrong) == 1 and "401" in wrong.pop()  # the browser's own line about the status
        page.fill("#key", "secret")
        page.fill("#seed", "3")
        page.click("#send")
        page.locator("#figures", has_text="tokens in").wait_for()
        expected = trained_otherwise.generate(PROMPT, decoder=decoder, seed=3, length=24)
        assert page.text_content(".turn.answer") == expected
        canvases = page.evaluate("window.canvases")
        assert len({tuple(canvas) for canvas in canvases}) > 3 and len(canvases[-1]) == 24
        assert wrong == []
        page.screenshot(path=str(tmp_path / "page.png"))
        assert pathlib.Path(tmp_path / "page.png").stat().st_size > 10_000


def test_stop_ends_an_answer(stories, browser):
    limits = dataclasses.replace(live_server.LIMITS, slots=1, context=500)
    with live_server.live(live_server.loaded(stories, length=480), limits) as url:
        page = browser.new_page()
        page.goto(url)
        page.fill("#prompt", PROMPT)
        page.click("#send")
        page.wait_for_selector("#canvas .cell")
        page.click("#stop")
        page.locator("#figures", has_text="stopped").wait_for()
        text = page.text_content(".turn.answer")
        assert stories.generate(PROMPT, length=480).startswith(text)
        live_server.wait_for(
            lambda: b"diffusion_t5x_texts_running 0.0" in urllib.request.urlopen(f"{url}/metrics").read()
        )
