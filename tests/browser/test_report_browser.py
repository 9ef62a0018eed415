"""The HTML report in a real browser: it draws, zooms, changes its theme and calls nobody."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import pytest
import report_samples as samples

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
if not (CHROMIUM and DRIVER):
    pytest.skip("needs Chromium and its driver", allow_module_level=True)
pytest.importorskip("altair", reason="needs the extra `report`")
webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")

# ruff: noqa: E402
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from pytest_llmserve.report.html import write_report

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--window-size=1200,900",
)  # fmt: skip
BAD = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Generator[Any, None, None]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


def capstone(folder: Path) -> tuple[list[Any], list[Path]]:
    return [samples.capstone(folder)], [folder]


def failing(folder: Path) -> tuple[list[Any], list[Path]]:
    bounds = (("output_throughput", ">=", 1e6), ("ttft.p99", "<=", 0.4))
    run = samples.make_run(folder, "a", 8, 4.0, bounds=bounds, server=BAD, test=f"t.py::x[{BAD}]")
    return [samples.document(run)], [folder]


def invalid(folder: Path) -> tuple[list[Any], list[Path]]:
    checks = (("errors", False, f"12 requests failed {BAD}"), ("lengths", True, "as asked"))
    run = samples.make_run(folder, "a", 8, 4.0, failures=12, checks=checks, model=BAD)
    return [samples.document(run)], [folder]


def engines(folder: Path) -> tuple[list[Any], list[Path]]:
    bases = [folder / name for name in ("vllm", "tensorrt-llm")]
    documents = [
        samples.capstone(base, engine=base.name, emulated=False, speed=speed)
        for base, speed in zip(bases, (1.0, 1.3), strict=True)
    ]
    return documents, bases


def nights(folder: Path) -> tuple[list[Any], list[Path]]:
    documents = [
        samples.document(
            samples.make_run(folder, f"{night}", 8, 3.0, seed=night, wall=1.79e9 + 86400 * night)
        )
        for night in range(30)
    ]
    return documents, [folder] * 30


def sides(folder: Path) -> tuple[list[Any], list[Path]]:
    runs = [
        samples.make_run(folder, f"{i}", 8, 3.0, seed=i, speed=1.0 + 0.3 * (label == "B"))
        | {"label": label}
        for i, label in enumerate("ABBAAB")
    ]
    return [samples.document(*runs)], [folder]


def gpu(folder: Path) -> tuple[list[Any], list[Path]]:
    bounds = (("output_throughput", ">=", 100.0), ("ttft.p50", "<=", 0.4))
    run = samples.make_run(folder, "a", 8, 4.0, emulated=False, engine="vllm", bounds=bounds)
    samples.add_telemetry(run)
    return [samples.document(run)], [folder]


@pytest.fixture(scope="module")
def opened(
    browser: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Callable[[Path], tuple[list[Any], list[Path]]]], list[Any]]:
    """Opens the report that a maker makes, and waits until its open charts are drawn."""
    made: dict[str, tuple[Path, list[Any]]] = {}

    def open_report(maker: Callable[[Path], tuple[list[Any], list[Path]]]) -> list[Any]:
        if maker.__name__ not in made:
            folder = tmp_path_factory.mktemp(maker.__name__)
            documents, bases = maker(folder)
            write_report(folder / "report.html", documents, base=bases)
            made[maker.__name__] = folder / "report.html", documents
        path, documents = made[maker.__name__]
        browser.get_log("browser")
        browser.get_log("performance")
        browser.get(path.as_uri())
        drawn(browser)
        return documents

    return open_report


def drawn(browser: Any) -> list[Any]:
    """The charts outside folded sections, once all are drawn."""
    script = """
        const charts = [...document.querySelectorAll('.chart')]
          .filter(chart => !chart.closest('details:not([open])'));
        return charts.every(chart => chart.dataset.drawn) ? charts : [];
    """
    deadline = time.monotonic() + 60
    while True:
        charts: list[Any] = browser.execute_script(script)
        if charts:
            return charts
        assert time.monotonic() < deadline, "charts were not drawn"
        time.sleep(0.1)


def values(browser: Any, head: str) -> list[list[float]]:
    """The figures of each row with this heading, as the page holds them."""
    script = """
        return [...document.querySelectorAll('tr')]
          .filter(row => row.querySelector('th')?.textContent.trim() === arguments[0])
          .map(row => [...row.querySelectorAll('data')].map(cell => Number(cell.value)))
    """
    found: list[list[float]] = browser.execute_script(script, head)
    return found


@pytest.mark.parametrize("maker", [capstone, failing, invalid, engines, nights, sides, gpu])
def test_opens_draws_and_calls_nobody(maker: Any, browser: Any, opened: Any) -> None:
    documents = opened(maker)
    charts = drawn(browser)
    pictures = "return arguments[0].map(chart => chart.querySelector('svg')?.textContent ?? '')"
    pictures = browser.execute_script(pictures, charts)
    assert all(pictures)
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert [url for url in asked if not url.startswith("data:")] == [browser.current_url]
    assert "owned" not in browser.title
    runs = [run for document in documents for run in document["runs"]]
    shown = values(browser, "ttft")
    for run in runs:
        wanted = [run["metrics"]["ttft"][s] for s in ("mean", "p50", "p90", "p95", "p99", "max")]
        assert wanted in shown
    text = browser.find_element(By.TAG_NAME, "body").text
    emulated = any(run["emulated"] for run in runs)
    assert ("Emulated." in text) == emulated
    if emulated:
        assert all("emulated" in picture for picture in pictures)
    if maker in (failing, invalid):
        assert BAD in text
    for verdict in {run["verdict"] for run in runs if run["verdict"]}:
        assert {"pass": "passed", "fail": "failed"}.get(verdict, verdict) in text


def test_every_load_of_a_curve_can_be_opened(browser: Any, opened: Any) -> None:
    opened(capstone)
    before = len(drawn(browser))
    for summary in browser.find_elements(By.CSS_SELECTOR, "details.run > summary"):
        summary.click()
    assert len(drawn(browser)) == before + 6 * 6  # six charts of each of the six loads
    assert browser.get_log("browser") == []


def bars(timeline: Any) -> int:
    """Bars that the waterfall draws, of both parts of a request."""
    chart = timeline.find_elements(By.CLASS_NAME, "chart")[-1]
    return len(chart.find_elements(By.CSS_SELECTOR, ".mark-rect path"))


def settle(check: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_zoom_by_button_key_and_drag(browser: Any, opened: Any) -> None:
    opened(capstone)
    timeline = browser.find_element(By.CLASS_NAME, "timeline")
    shown = timeline.find_element(By.TAG_NAME, "output")
    whole = bars(timeline)
    assert whole > 200
    timeline.find_element(By.CSS_SELECTOR, "[data-zoom=in]").click()
    settle(lambda: 0 < bars(timeline) < whole)
    start, end = _seconds(shown.text)
    assert end - start == pytest.approx(_length(browser) / 2, abs=0.02)
    timeline.find_element(By.CSS_SELECTOR, "[data-zoom=later]").click()
    settle(lambda: _seconds(shown.text)[0] > start)
    browser.execute_script("arguments[0].focus()", timeline)
    ActionChains(browser).send_keys("0").perform()
    settle(lambda: bars(timeline) == whole)
    assert shown.text == ""
    ActionChains(browser).send_keys("+").send_keys("+").send_keys(Keys.ARROW_LEFT).perform()
    settle(lambda: shown.text != "" and _seconds(shown.text)[1] < _length(browser) / 2 + 1)
    assert bars(timeline) < whole / 2
    timeline.find_element(By.CSS_SELECTOR, "[data-zoom=all]").click()
    settle(lambda: bars(timeline) == whole)
    chart = timeline.find_elements(By.CLASS_NAME, "chart")[0]
    ActionChains(browser).move_to_element_with_offset(
        chart, -100, 20
    ).click_and_hold().move_by_offset(200, 0).release().perform()
    settle(lambda: shown.text != "")
    start, end = _seconds(shown.text)
    plot = chart.size["width"] - 80
    assert end - start == pytest.approx(200 / plot * _length(browser), rel=0.1)
    assert browser.get_log("browser") == []


def _seconds(text: str) -> tuple[float, float]:
    start, end = text.replace(" s", "").split(" to ")
    return float(start), float(end)


def _length(browser: Any) -> float:
    script = """
        const data = JSON.parse(document.getElementById('llmserve-data').textContent);
        return data.figures.find(figure => figure.kind === 'rate').params.t1;
    """
    return float(browser.execute_script(script))


def test_theme_follows_the_system_and_the_reader(browser: Any, opened: Any) -> None:
    opened(failing)

    def look() -> tuple[str, str]:
        paper = "return getComputedStyle(document.documentElement).backgroundColor"
        title = "return getComputedStyle(document.querySelector('.chart .role-title text')).fill"
        return browser.execute_script(paper), browser.execute_script(title)

    def system(theme: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": theme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    system("light")
    light = look()
    system("dark")
    dark = look()
    assert dark[0] != light[0]
    assert dark[1] != light[1]
    choice = Select(browser.find_element(By.ID, "theme"))
    choice.select_by_value("light")
    assert look() == light
    browser.refresh()
    drawn(browser)
    assert look() == light  # it was remembered
    system("light")
    Select(browser.find_element(By.ID, "theme")).select_by_value("dark")
    assert look() == dark
    Select(browser.find_element(By.ID, "theme")).select_by_value("auto")
    assert look() == light
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("maker", [capstone, failing, engines])
def test_fits_a_phone(maker: Any, browser: Any, opened: Any) -> None:
    metrics = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        opened(maker)
        size = "return [document.documentElement.scrollWidth, innerWidth]"
        width, room = browser.execute_script(size)
        assert width <= room == 390
        for chart in drawn(browser):
            assert 250 <= chart.find_element(By.TAG_NAME, "svg").size["width"] <= 390
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_links_unfold_what_they_point_to(browser: Any, opened: Any) -> None:
    opened(nights)
    folded = browser.find_element(By.CSS_SELECTOR, "details.case:not([open])")
    anchor = folded.get_attribute("id")
    browser.execute_script("location.hash = arguments[0]", anchor)
    settle(lambda: folded.get_attribute("open") is not None)
    drawn(browser)


def test_reached_and_read_without_a_mouse(browser: Any, opened: Any) -> None:
    opened(capstone)
    tree = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    names: dict[str, list[str]] = {}
    for node in tree:
        if not node.get("ignored"):
            name = node.get("name", {}).get("value", "")
            names.setdefault(node["role"]["value"], []).append(name)
    images = names.get("image", []) + names.get("img", [])
    assert len(images) >= len(drawn(browser))
    assert all(name.startswith("Emulated.") for name in images)
    assert not [role for role in names if role.startswith("graphics")]
    assert "Zoom in" in names["button"]
    assert any("Verdicts" in name for name in names["heading"])
    seen: Sequence[str] = []
    for _ in range(4):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        seen = [*seen, browser.switch_to.active_element.accessible_name]
    assert seen[0] == "Skip to the verdicts"
    assert "Theme" in seen[1]


def test_print_shows_all_that_is_open(browser: Any, opened: Any) -> None:
    opened(capstone)
    count = len(drawn(browser))
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        assert browser.execute_script(
            "return getComputedStyle(document.querySelector('.zoom')).display"
        ) == "none"  # fmt: skip
        pdf = browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"]
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert len(pdf) > 100_000
    assert len(drawn(browser)) == count
