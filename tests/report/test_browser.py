"""Every kind of report in a real browser: nothing fetched, nothing complained of, nothing cut, covered or too faint, at
any width, in light, dark and print, and by keyboard."""

from __future__ import annotations

import subprocess
from itertools import pairwise
from pathlib import Path

import chromium
import pytest
import reports

from qkit.measure.endpoint import page as endpoint
from qkit.report import write as measured
from qkit.report.predicted import write as predicted

PROGRAM = chromium.find()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason=f"none of {', '.join(chromium.NAMES)} is on PATH")
WIDTHS = (390, 768, 1280, 1920)
KINDS = ("alone", "pair", "beside", "several", "swept", "served", "one", "four", "all", "two")


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pages")
    bodies = {name: measured.to_html(result) for name, result in reports.measurements().items()}
    bodies["served"] = endpoint.html(reports.served())
    bodies |= {name: predicted.to_html(result) for name, result in reports.predictions(root).items()}
    for name, body in bodies.items():
        (root / f"{name}.html").write_text(body)
    return {name: root / f"{name}.html" for name in bodies}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    assert PROGRAM is not None
    try:
        found = chromium.Browser(PROGRAM, tmp_path_factory.mktemp("profile"))
    except (OSError, TimeoutError) as error:
        pytest.skip(f"{PROGRAM} does not start here: {error}")
    yield found
    found.close()


# Each gives a list of what is wrong.
OVERFLOW = """(() => {
  const page = document.documentElement, wide = page.scrollWidth - innerWidth;
  return wide > 0 ? [`the page is ${wide} px too wide`] : [];
})()"""

CHARTS = """(() => {
  const wrong = [];
  for (const svg of document.querySelectorAll("svg")) {
    const name = svg.getAttribute("aria-label").slice(0, 40), frame = svg.getBoundingClientRect();
    if (frame.width < 200 || frame.height < 15) wrong.push(`${name}: ${frame.width} x ${frame.height}`);
    const shapes = [...svg.querySelectorAll("rect, circle, path, line")].map(e => e.getBoundingClientRect());
    if (shapes.length && !shapes.some(r => r.width > 1 && r.height > 1)) wrong.push(`${name}: nothing is drawn`);
    const texts = [...svg.querySelectorAll("text")].map(e => [e.textContent, e.getBoundingClientRect()]);
    for (const [words, r] of texts)
      if (r.left < frame.left - 1 || r.right > frame.right + 1 || r.top < frame.top - 1 || r.bottom > frame.bottom + 1)
        wrong.push(`${name}: ${words} is cut`);
    const slack = 0.25;  // of a line's box, which is taller than its letters
    texts.forEach(([words, a], i) => texts.slice(i + 1).forEach(([others, b]) => {
      const x = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const y = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (x > 1 && y > slack * Math.min(a.height, b.height)) wrong.push(`${name}: ${words} covers ${others}`);
    }));
  }
  return wrong;
})()"""

CUT = """(() => [...document.querySelectorAll("h1, h2, h3, h4, p, li, dd, dt, summary, pre")]
  .filter(e => e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 0)
  .map(e => `${e.tagName} is cut: ${e.textContent.slice(0, 60)}`))()"""

FAINT = """(() => {
  const parse = c => { const m = c.match(/[\\d.]+/g).map(Number); return m.length === 4 && m[3] === 0 ? null : m; };
  const channel = v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = c => 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]);
  const contrast = (a, b) => {
    const [x, y] = [light(a), light(b)].sort((p, q) => p - q);
    return (y + 0.05) / (x + 0.05);
  };
  const behind = e => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c) return c;
    }
    return [255, 255, 255];
  };
  const wrong = new Set(), walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let seen = 0;
  while (walker.nextNode()) {
    const words = walker.currentNode.textContent.trim(), e = walker.currentNode.parentElement;
    if (!words || e.closest("title, style")) continue;
    const drawn = e.closest("svg") !== null, style = getComputedStyle(e);
    const ink = parse(drawn ? style.fill : style.color);
    const under = e.classList.contains("on-fill") ? parse(getComputedStyle(e.previousElementSibling).fill)
      : behind(drawn ? e.closest("svg").parentElement : e);
    seen += 1;
    if (contrast(ink, under) < 4.5) wrong.add(`${contrast(ink, under).toFixed(2)}: ${words.slice(0, 40)}`);
  }
  return seen ? [...wrong] : ["no text was seen"];
})()"""

OPEN = "document.querySelectorAll('details').forEach(each => each.open = true)"


def wrong(browser: chromium.Browser, *checks: str) -> list[str]:
    return [each for check in checks for each in browser.run(check)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_report_fetches_nothing_and_stays_whole_at_any_width(browser, pages, kind):
    for width in WIDTHS:
        for dark in (False, True):
            browser.open(pages[kind], width, dark)
            assert browser.run("matchMedia('(prefers-color-scheme: dark)').matches") is dark
            assert browser.requests() == [pages[kind].resolve().as_uri()] and browser.complaints() == []
            assert wrong(browser, OVERFLOW, CHARTS, CUT, FAINT) == []
            browser.run(OPEN)
            assert wrong(browser, OVERFLOW, CHARTS, CUT, FAINT) == []
            browser.run("new Promise(done => setTimeout(done, 20))")
            assert len(browser.requests()) == 1 and browser.complaints() == []


@pytest.mark.parametrize("kind", KINDS)
def test_on_paper_nothing_is_cut(browser, pages, kind, tmp_path):
    browser.open(pages[kind], 718, dark=True)  # A4 between its margins
    browser.send(
        "Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}]
    )
    tables = """[...document.querySelectorAll(".scroll")].filter(e => e.scrollWidth > e.clientWidth + 1)
      .map(e => `${e.getAttribute("aria-label")} is ${e.scrollWidth - e.clientWidth} px too wide`)"""
    assert wrong(browser, OVERFLOW, CHARTS, CUT, FAINT, tables) == []
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    browser.send("Emulation.setEmulatedMedia", media="")
    browser.pdf(tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF") and (
        tmp_path / "report.pdf"
    ).stat().st_size > 20_000


@pytest.mark.parametrize("kind", KINDS)
def test_a_report_is_read_out_and_walked_through(browser, pages, kind):
    browser.open(pages[kind], 1280)
    tree = browser.send("Accessibility.getFullAXTree")["nodes"]
    shown = [n for n in tree if not n.get("ignored")]
    named = {
        role: [n["name"]["value"] for n in shown if n["role"]["value"] == role]
        for role in ("image", "heading", "table")
    }
    assert named["image"] and all(any(c.isdigit() for c in name) and len(name) > 40 for name in named["image"])
    assert len(named["heading"]) >= 4 and all(named["heading"]) and named["table"]
    levels = browser.run("[...document.querySelectorAll('h1,h2,h3,h4')].map(e => +e.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1 and all(b <= a + 1 for a, b in pairwise(levels))
    assert browser.run("[...document.querySelectorAll('th')].every(e => ['col', 'row'].includes(e.scope))")
    assert browser.run("document.documentElement.lang") == "en"
    assert browser.run("[...document.querySelectorAll('[tabindex]')].every(e => e.tabIndex <= 0)")
    # Every folded part is reached by Tab, and opened by Enter.
    folded = browser.run("document.querySelectorAll('details').length")
    reached = set()
    for _ in range(60):
        press(browser, "Tab", 9)
        at = "[...document.querySelectorAll('summary')].indexOf(document.activeElement)"
        index = browser.run(at)
        if index >= 0 and index not in reached:
            reached.add(index)
            press(browser, "Enter", 13)
    assert len(reached) == folded > 0
    assert browser.run("[...document.querySelectorAll('details')].every(e => e.open)")


def press(browser: chromium.Browser, key: str, code: int) -> None:
    more = {"text": "\r"} if key == "Enter" else {}
    for kind in ("keyDown", "keyUp"):
        browser.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **more)


BAD = """<!doctype html><html lang="en"><body style="background:#fff"><main>
<p style="width:2000px">wide</p> <p style="color:#bbbbbb">faint</p>
<p style="width:40px;overflow:hidden">unbreakable_word</p>
<svg viewBox="0 0 400 40" width="300" height="30" role="img" aria-label="bad"><rect width="100" height="20"/>
<text x="0" y="20">one</text> <text x="4" y="20">two</text><text x="390" y="20">outside</text></svg>
<img src="https://example.com/x.png"><script>console.log("said"); undefined.nothing</script></main></body></html>"""


def test_the_checks_see_what_is_wrong(browser, tmp_path):
    """A page with every fault that they are for."""
    page = tmp_path / "bad.html"
    page.write_text(BAD)
    browser.open(page, 390)
    assert len(browser.requests()) == 2
    told = " ".join(browser.complaints())
    assert "said" in told and "nothing" in told
    found = "; ".join(wrong(browser, OVERFLOW, CHARTS, CUT, FAINT))
    for words in ("too wide", "one covers two", "outside is cut", "P is cut: unbreakable", ": faint"):
        assert words in found


def test_the_browser_ends_with_the_tests(tmp_path):
    assert PROGRAM is not None
    browser = chromium.Browser(PROGRAM, tmp_path / "profile")
    process = browser._process
    browser.close()
    assert isinstance(process, subprocess.Popen) and process.poll() is not None
