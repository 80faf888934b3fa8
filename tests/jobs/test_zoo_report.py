"""The report in a real browser: it sorts, filters, draws, works from the keyboard and on a narrow screen, offline."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome, ChromeOptions, ChromeService, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.support.select import Select

from jobs.result import LayerDamage, LayerQuality
from jobs.zoo.report import render
from jobs.zoo.row import ZooRow

LAYERS = (
    LayerQuality(name="stem.conv", bits=(8, 4), weights=432, sqnr_db=(12.5, 40.25)),
    LayerQuality(name="a.long.qualified.name.of.some.block.conv", bits=(8, 4), weights=9216, sqnr_db=(20.0, None)),
)
DAMAGES = (
    LayerDamage(images=64, noise=False, divergence=0.0125, same=98.4375, drop=1.5625),
    LayerDamage(images=64, noise=False, divergence=0.05, same=93.75, drop=None),
)
DAMAGED = tuple(layer.model_copy(update={"damage": damage}) for layer, damage in zip(LAYERS, DAMAGES, strict=True))
HOSTILE = 'x</script><script>document.title="owned"</script><!--'


def row(model: str, *, top1: float | None, high: int = 0, status: str = "done", error: str | None = None) -> ZooRow:
    figures: dict[str, Any] = {}
    if top1 is not None:
        modes = {"float": top1, "full": top1 - 0.5, "part": top1 - 3}
        figures = {
            f"top1_{mode}{end}": value for mode, top in modes.items() for end, value in (("", top), ("_err", 1.25))
        }
        figures |= {
            "high_bytes": high,
            "low_bytes": high,
            "base_bytes": 1000,
            "float_bytes": 8 * high,
            "weights": 2 * high,
        }
        figures |= {"bits_per_weight": 8.0, "version": 1, "layers": LAYERS}
    return ZooRow.model_validate(
        {
            "model": model,
            "library": "timm",
            "revision": "r",
            "recipe": "w8-4",
            "status": status,
            "error": error,
            "name": f"timm.{model}.w8-4",
            "request": "sha256:0",
            "seconds": 1.5,
            "attempts": 1,
            "tool_versions": {"torch": "2.15.0"},
            **figures,
        }
    )


ROWS = [
    row("middle", top1=60.0, high=2_000_000),
    row("best", top1=90.0, high=30_000_000),
    row("broken", top1=None, status="failed", error=HOSTILE),
    row("worst", top1=9.5, high=100_000, status="below gate", error="part-bit top-1 is 6.50%").model_copy(
        update={"layers": DAMAGED}
    ),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        message = "no chromium and chromedriver on the PATH (Debian: chromium, chromium-driver)"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    options = ChromeOptions()
    options.binary_location = chromium
    profile = tmp_path_factory.mktemp("chromium")
    for word in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={profile}",
    ):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = Chrome(options=options, service=ChromeService(driver))
    yield opened
    opened.quit()


@pytest.fixture
def page(browser: Chrome, tmp_path: Path) -> Iterator[Chrome]:
    path = tmp_path / "zoo.html"
    path.write_text(render("night <run>", ROWS), encoding="utf-8")
    browser.set_window_size(1280, 900)
    browser.get(path.as_uri())
    yield browser
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def models(page: Chrome) -> list[str]:
    return [cell.text for cell in page.find_elements(By.CSS_SELECTOR, "#results tbody th")]


def column(page: Chrome, key: str) -> Any:
    return page.find_element(By.CSS_SELECTOR, f"#results thead th[data-key={key}]")


def test_the_page_shows_every_row_and_counts_them(page: Chrome) -> None:
    assert page.title == "night <run>"
    assert models(page) == ["middle", "best", "broken", "worst"]
    told = page.find_element(By.ID, "summary").text
    assert told == "4 versions: 2 done, 1 below their gate, 1 failed. Made with torch=2.15.0."
    cells = [cell.text for cell in page.find_elements(By.CSS_SELECTOR, "#results tbody tr:first-child > *")]
    assert cells[:7] == ["middle", "w8-4", "timm", "done", "60.00 ± 1.25", "59.50 ± 1.25", "57.00 ± 1.25"]
    assert cells[7:14] == ["4,000,000", "8.00", "16.00 MB", "4.00 MB", "2.00 MB", "2.00 MB", "1.5"]


def test_a_click_sorts_numbers_downwards_then_upwards_and_the_unknown_last(page: Chrome) -> None:
    header = column(page, "full")
    header.find_element(By.TAG_NAME, "button").click()
    assert (models(page), header.get_attribute("aria-sort")) == (["best", "middle", "worst", "broken"], "descending")
    header.find_element(By.TAG_NAME, "button").click()
    assert (models(page), header.get_attribute("aria-sort")) == (["worst", "middle", "best", "broken"], "ascending")
    column(page, "model").find_element(By.TAG_NAME, "button").click()
    assert models(page) == ["best", "broken", "middle", "worst"]
    assert header.get_attribute("aria-sort") == "none"


def test_the_keyboard_reaches_and_sorts_and_filters(page: Chrome) -> None:
    focused = page.switch_to.active_element
    focused.send_keys(Keys.TAB)
    assert page.switch_to.active_element.get_attribute("id") == "filter"
    page.switch_to.active_element.send_keys("bro")
    assert models(page) == ["broken"]
    assert page.find_element(By.ID, "shown").text == "1 of 4"
    page.switch_to.active_element.send_keys(Keys.BACKSPACE * 3 + Keys.TAB)
    assert page.switch_to.active_element.get_attribute("aria-label") == "Results table, scrolls sideways"
    page.switch_to.active_element.send_keys(Keys.TAB)
    button = page.switch_to.active_element
    assert (button.tag_name, button.text) == ("button", "model")
    outline = button.value_of_css_property("outline-style")
    button.send_keys(Keys.ENTER)
    assert (models(page), outline) == (["best", "broken", "middle", "worst"], "solid")


def test_accuracy_against_bytes_has_two_points_a_version(page: Chrome) -> None:
    points = page.find_elements(By.CSS_SELECTOR, "#plot circle")
    assert [point.get_attribute("class") for point in points] == ["full", "part"] * 3
    left = {
        kind: [float(point.get_attribute("cx") or "") for point in points[start::2]] for start, kind in enumerate("fp")
    }
    assert left["f"][1] > left["f"][0] > left["f"][2]
    assert all(part < full for full, part in zip(left["f"], left["p"], strict=True))
    titles = page.find_elements(By.CSS_SELECTOR, "#plot title")
    assert titles[1].get_attribute("textContent") == (
        "timm.best.w8-4: full-bit 89.50% in 60.00 MB, part-bit 87.00% in 30.00 MB"
    )


def words_in_plot(page: Chrome) -> list[tuple[str, float, float]]:
    """The words of the picture and where each begins and ends, in pixels from its left edge."""
    found: list[tuple[str, float, float]] = page.execute_script(
        "return [...document.querySelectorAll('#plot text')].map(text => {"
        "const box = text.getBBox(); return [text.textContent, box.x, box.x + box.width]; })"
    )
    return found


def test_points_have_names_and_no_word_is_cut(page: Chrome) -> None:
    ends = {"middle", "best", "worst"}
    words = words_in_plot(page)
    width = float(page.find_element(By.CSS_SELECTOR, "#plot svg").get_attribute("width") or "")
    assert ends <= {text for text, _, _ in words}
    assert [text for text, _, _ in words if text.endswith(" MB")] == ["1 MB", "2 MB", "5 MB", "10 MB", "20 MB", "50 MB"]
    assert all(begin >= 0 and end <= width for _, begin, end in words)


def test_two_recipes_of_a_model_share_one_name(browser: Chrome, tmp_path: Path) -> None:
    path = tmp_path / "twins.html"
    twins = [row("twin", top1=60.0, high=2_000_000), row("twin", top1=60.5, high=2_000_000)]
    path.write_text(render("twins", twins), encoding="utf-8")
    browser.get(path.as_uri())
    assert [text for text, _, _ in words_in_plot(browser)].count("twin") == 1
    assert len(browser.find_elements(By.CSS_SELECTOR, "#plot circle")) == 4


def test_the_table_says_where_the_weights_are_from(browser: Chrome, tmp_path: Path) -> None:
    path = tmp_path / "weights.html"
    file = row("file", top1=60.0).model_copy(update={"revision": f"sha256:{'ab' * 32}"})
    seed = row("seed", top1=60.0).model_copy(update={"revision": "timm 1.0.31 random_seed 0"})
    path.write_text(render("weights", [file, seed]), encoding="utf-8")
    browser.get(path.as_uri())
    place = [cell.text for cell in browser.find_elements(By.CSS_SELECTOR, "#results thead button")].index(
        "weights from"
    )
    lines = browser.find_elements(By.CSS_SELECTOR, "#results tbody tr")
    told = [line.find_elements(By.CSS_SELECTOR, "th, td")[place].text for line in lines]
    assert told == ["sha256:abababab…", "timm 1.0.31 random_seed 0"]


def test_layers_show_what_each_loses_and_follow_the_chosen_version(page: Chrome) -> None:
    choice = Select(page.find_element(By.ID, "version"))
    assert [option.text for option in choice.options] == ["middle · w8-4", "best · w8-4", "worst · w8-4"]
    choice.select_by_index(2)
    picture = page.find_element(By.CSS_SELECTOR, "#layers svg")
    assert picture.get_attribute("aria-label") == "Signal to noise of 2 layers of worst"
    told = [title.get_attribute("textContent") for title in picture.find_elements(By.TAG_NAME, "title")]
    assert told == [
        "stem.conv: 432 weights, 8 over 4 bits, full-bit 40.3 dB, part-bit 12.5 dB",
        "a.long.qualified.name.of.some.block.conv: 9,216 weights, 8 over 4 bits, full-bit exact, part-bit 20.0 dB",
    ]


def test_damage_by_layer_follows_the_version_and_sorts_from_the_keyboard(page: Chrome) -> None:
    place = page.find_element(By.ID, "damage")
    assert place.text == "Not measured: 'analysis' or 'quantize.mixed' in a job's spec does."
    Select(page.find_element(By.ID, "version")).select_by_index(2)
    picture = page.find_element(By.CSS_SELECTOR, "#damage svg")
    assert picture.get_attribute("aria-label") == "Damage done by each of 2 layers of worst alone"
    assert page.find_element(By.ID, "damage-on").text == ", over 64 calibration images"
    first = "stem.conv: 432 weights, 8 over 4 bits, 0.0125 nats, 98.4% same answers, 1.56 points of top-1 lost"
    second = "a.long.qualified.name.of.some.block.conv: 9,216 weights, 8 over 4 bits, 0.0500 nats, 93.8% same answers"
    assert titles(page) == [first, second]
    widths = [float(bar.get_attribute("width") or "") for bar in page.find_elements(By.CSS_SELECTOR, "#damage rect")]
    assert widths[0] / widths[1] == pytest.approx(0.25)
    page.find_element(By.ID, "version").send_keys(Keys.TAB)
    order = page.switch_to.active_element
    assert order.get_attribute("id") == "damage-order"
    order.send_keys(Keys.ARROW_DOWN)
    assert titles(page) == [second, first]


def titles(page: Chrome) -> list[str | None]:
    return [title.get_attribute("textContent") for title in page.find_elements(By.CSS_SELECTOR, "#damage title")]


def test_nothing_breaks_out_and_nothing_is_asked_of_the_network(page: Chrome) -> None:
    error = page.find_element(By.CSS_SELECTOR, "td.error")
    assert error.get_attribute("textContent") == HOSTILE
    assert page.title == "night <run>"
    loaded = page.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [name for name in loaded if not name.startswith("data:")] == []
    refused = page.execute_async_script(
        "const done = arguments[0];fetch('http://127.0.0.1:9/').then(() => done('asked'), error => done(error.message))"
    )
    assert "Failed to fetch" in refused
    logged = [entry["message"] for entry in page.get_log("browser")]
    assert any("Content Security Policy" in message for message in logged)


def test_a_narrow_screen_scrolls_the_table_alone_and_keeps_text_readable(page: Chrome) -> None:
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    )
    try:
        page.refresh()
        width, page_width = page.execute_script("return [window.innerWidth, document.documentElement.scrollWidth]")
        assert (width, page_width) == (360, 360)
        Select(page.find_element(By.ID, "version")).select_by_index(2)
        assert len(page.find_elements(By.CSS_SELECTOR, "svg")) == 3
        table = page.find_element(By.CSS_SELECTOR, ".scroll")
        assert page.execute_script("return arguments[0].scrollWidth > arguments[0].clientWidth", table)
        for picture in page.find_elements(By.CSS_SELECTOR, "svg"):
            drawn = page.execute_script("return arguments[0].getBoundingClientRect().width", picture)
            assert all(begin >= 0 and end <= drawn for _, begin, end in words_in_plot(page))
            assert 300 < drawn <= 360
            assert drawn == float(picture.get_attribute("width") or "")  # so 12 px of text are 12 px
        name = page.find_elements(By.CSS_SELECTOR, "#layers text.name")[1].text
        assert name.startswith("…")
        assert name.endswith("block.conv")
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
