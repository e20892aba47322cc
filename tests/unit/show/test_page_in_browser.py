"""The report as Chromium shows it: nothing spills over, nothing is fetched, everything can be read and reached."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from knormpress.records.history import History
from knormpress.records.schema import Entry
from knormpress.show.page.report import write_report
from tests.entry_factory import make_entry
from tests.record_factory import make_record, make_records

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")

pytestmark = pytest.mark.skipif(BROWSER is None or DRIVER is None, reason="needs chromium and chromedriver on the PATH")

HOSTILE = "</script><img src=https://example.org/x onerror=console.error(1)>\"'&" + "long" * 60

# Every element that spills over the page's right edge, unless it lies in a container that scrolls by itself.
SPILLING = """
const screen = document.documentElement.clientWidth;
const wide = document.documentElement.scrollWidth > screen ? ["the page itself"] : [];
for (const element of document.body.querySelectorAll("*")) {
  if (element.closest(".scroll, .unseen") || element.closest("svg") !== null) continue;
  if (element.getBoundingClientRect().right > screen + 1) wide.push(element.outerHTML.slice(0, 120));
}
return wide;
"""

# WCAG 2.2, 1.4.3: the contrast of each text with what is behind it, where it is below 4.5.
FAINT = """
const channels = colour => (colour.match(/[\\d.]+/g) || []).map(Number);
const light = colour => {
  const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const [r, g, b] = channels(colour).map(v => linear(v / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = element => {
  if (element.namespaceURI.includes("svg")) {
    element.scrollIntoView({block: "center", behavior: "instant"});
    const box = element.getBoundingClientRect();
    const below = document.elementsFromPoint(box.x + box.width / 2, box.y + box.height / 2);
    const filled = below.find(one => one.matches("svg path") && getComputedStyle(one).fill !== "none");
    if (filled) return getComputedStyle(filled).fill;
  }
  for (; element; element = element.parentElement) {
    const colour = getComputedStyle(element).backgroundColor;
    if ((channels(colour)[3] ?? 1) > 0) return colour;
  }
  return "rgb(255, 255, 255)";
};
const faint = [];
for (const element of document.body.querySelectorAll("*")) {
  if (![...element.childNodes].some(node => node.nodeType === 3 && node.data.trim())) continue;
  const style = getComputedStyle(element);
  const [a, b] = [light(element.namespaceURI.includes("svg") ? style.fill : style.color), light(behind(element))];
  const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (!(contrast >= 4.5)) faint.push(`${element.textContent.slice(0, 40)}: ${contrast}`);
}
return faint;
"""


class Browser:
    """Headless Chromium, told how wide its screen is and which colours it prefers."""

    def __init__(self) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = str(BROWSER)
        for argument in ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))

    def open(self, path: Path, width: int = 1280, scheme: str = "light") -> None:
        # A headless window is never narrower than about 500 pixels: a screen can be.
        screen = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        for kind in ("browser", "performance"):
            self.driver.get_log(kind)
        self.driver.get(path.as_uri())
        self.ask("document.querySelectorAll('details').forEach(one => one.open = true)")

    def ask(self, script: str) -> Any:
        return self.driver.execute_script(script)

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith("data:")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    browser = Browser()
    yield browser
    browser.driver.quit()


def stored() -> tuple[Entry, ...]:
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return tuple(
        make_entry(
            run=f"r{number}",
            test=f"tests/perf/test_generation.py::test_{'speed' * 20}[{ratio}]",
            keep_ratio=ratio,
            created=f"2026-01-0{number + 1}",
            commit=head or None,
            tpot=20.0 * number,
            verdicts={"tpot": "regressed"} if number else {},
        )
        for number in range(2)
        for ratio in (0.9, 0.5)
    )


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("report")
    rich = [
        *make_records([1.0, 0.95, 0.9, 0.8, 0.7, 0.5, 0.05], ttft_cold_s=1.7),
        *make_records([0.7, 0.5], method="random", ppl=60.0),
        make_record(1.0, method="full"),
        *make_records([0.9, 0.7], prompt_tokens=8192),
    ]
    names = {"model_name": HOSTILE, "text_name": HOSTILE, "device_name": HOSTILE, "method": HOSTILE}
    kinds = {
        "minimal": ([make_record(0.9)], ()),
        "rich": (rich, stored()),
        "hostile": ([make_record(0.9, **names)], (make_entry(test=HOSTILE, method=HOSTILE),)),
        "history": ([], stored()),
    }
    for kind, (records, entries) in kinds.items():
        write_report(records, History(entries), folder / f"{kind}.html")
    return {kind: folder / f"{kind}.html" for kind in kinds}


# What spills over depends on the width alone, and what is faint on the colours alone.
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
@pytest.mark.parametrize("kind", ["minimal", "rich", "hostile", "history"])
def test_a_page_fits_is_legible_and_fetches_nothing(
    browser: Browser, pages: dict[str, Path], kind: str, width: int, scheme: str
) -> None:
    browser.open(pages[kind], width, scheme)
    assert browser.ask("return innerWidth") == width
    assert browser.ask(SPILLING) == []
    assert browser.ask(FAINT) == []
    assert browser.complaints() == []
    assert browser.requests() == [pages[kind].as_uri()]
    assert browser.ask("return document.querySelectorAll('script, img, iframe, object').length") == 0


def test_the_checks_find_what_they_are_for(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text(
        "<!DOCTYPE html><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        "<p style='width: 600px; color: #aaa'>faint</p>"
        "<svg width=90 height=90><path d='M0 0H90V90H0z' fill=#222 /><text x=9 y=40>dark</text></svg>"
        "<script>console.error('seen')</script><img src=missing.png>"
    )
    browser.open(page, 390)
    assert len(browser.ask(SPILLING)) == 2
    assert [fault.split(":")[0] for fault in browser.ask(FAINT)] == ["faint", "dark"]
    assert any("seen" in complaint for complaint in browser.complaints())
    assert browser.requests() == [page.as_uri(), (tmp_path / "missing.png").as_uri()]


def test_dark_pages_are_dark(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["minimal"], scheme="light")
    light = browser.ask("return getComputedStyle(document.body).backgroundColor")
    browser.open(pages["minimal"], scheme="dark")
    assert light == "rgb(246, 247, 248)"
    assert browser.ask("return getComputedStyle(document.body).backgroundColor") == "rgb(18, 21, 24)"


def test_the_keyboard_reaches_the_skip_link_first_then_every_table(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["rich"], 390)
    driver = browser.driver
    driver.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)
    first = driver.switch_to.active_element
    assert first.text == "Skip to the verdicts"
    # The link comes into view where it has the focus, and the focus can be seen.
    assert browser.ask("return document.activeElement.getBoundingClientRect().top") >= 0
    assert browser.ask("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    reached = []
    while (now := driver.switch_to.active_element).tag_name != "body" and now not in reached:
        reached.append(now)
        now.send_keys(Keys.TAB)
    scrolling = driver.find_elements(By.CLASS_NAME, "scroll")
    assert scrolling
    assert all(element in reached for element in scrolling)
    assert {element.tag_name for element in reached} == {"a", "div", "summary"}
    first.send_keys(Keys.ENTER)
    assert browser.ask("return document.activeElement.id") == "main"


def test_charts_have_names_and_descriptions_for_screen_readers(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["rich"])
    charts = browser.driver.find_elements(By.CSS_SELECTOR, "figure svg")
    assert len(charts) > 12
    assert {chart.aria_role for chart in charts} <= {"img", "image"}
    assert charts[0].accessible_name == "What speed costs in quality"
    words = charts[0].get_attribute("aria-describedby")
    assert "keep ratio 0.9: TPOT -15" in browser.ask(f"return document.getElementById('{words}').innerText")
