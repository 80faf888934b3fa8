"""The report in a real browser: it sorts, filters, draws, works from the keyboard and on a narrow screen, offline."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.support.select import Select

from jobs.result import LayerDamage, LayerQuality
from jobs.zoo.report import render
from jobs.zoo.row import ZooRow
from tests.browser import DESKTOP, PHONE, axe_findings, screen, severe

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


@pytest.fixture
def page(browser: Chrome, tmp_path: Path) -> Iterator[Chrome]:
    path = tmp_path / "zoo.html"
    path.write_text(render("night <run>", ROWS), encoding="utf-8")
    screen(browser, DESKTOP)
    browser.get(path.as_uri())
    yield browser
    assert severe(browser) == []


def models(page: Chrome) -> list[str]:
    shown = page.find_elements(By.CSS_SELECTOR, "#results tbody:not([hidden]) th")
    return [cell.text.splitlines()[0] for cell in shown]


def column(page: Chrome, key: str) -> Any:
    return page.find_element(By.CSS_SELECTOR, f"#results thead th[data-key={key}]")


def test_the_page_shows_every_row_and_counts_them(page: Chrome) -> None:
    assert page.title == "night <run>"
    assert models(page) == ["middle", "best", "broken", "worst"]
    told = page.find_element(By.ID, "summary").text
    assert told == "4 versions: 2 done, 1 below their gate, 1 failed. Made with torch=2.15.0."
    cells = [
        cell.text.replace("\n", " ") for cell in page.find_elements(By.CSS_SELECTOR, "#results tbody:nth-of-type(1) td")
    ]
    assert cells[:4] == ["done", "57.00 ± 1.25", "59.50 ± 1.25", "60.00 ± 1.25"]
    assert cells[4:] == ["2.00 MB", "2.00 MB", "4.00 MB", "16.00 MB", "8.00", "4,000,000", "1.5"]


def test_every_column_is_within_a_desktop_and_a_phone(page: Chrome) -> None:
    for size in (DESKTOP, PHONE):
        screen(page, size)
        for place in page.find_elements(By.CSS_SELECTOR, ".scroll"):
            inner, outer = page.execute_script("return [arguments[0].scrollWidth, arguments[0].clientWidth]", place)
            assert inner == outer
        assert page.execute_script("return document.documentElement.scrollWidth") <= size[0]


def test_what_was_not_measured_says_so_and_what_measures_it(page: Chrome) -> None:
    line = page.find_element(By.CSS_SELECTOR, "#results tbody:nth-of-type(3)")
    texts = [cell.text.replace("\n", " ") for cell in line.find_elements(By.CSS_SELECTOR, "tr:first-child td")]
    assert texts == ["failed", *["not measured"] * 3, *["\u2014"] * 6, "1.5"]
    assert "an evaluate section with labelled images" in page.find_element(By.TAG_NAME, "main").text


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
    page.switch_to.active_element.send_keys(Keys.TAB)
    assert page.switch_to.active_element.text == "To the content"
    page.switch_to.active_element.send_keys(Keys.TAB)
    assert page.switch_to.active_element.get_attribute("id") == "filter"
    page.switch_to.active_element.send_keys("bro")
    assert models(page) == ["broken"]
    assert page.find_element(By.ID, "results-shown").text == "1 of 4"
    page.switch_to.active_element.send_keys(Keys.BACKSPACE * 3 + Keys.TAB)
    assert page.switch_to.active_element.get_attribute("aria-label") == "Results, a table"
    page.switch_to.active_element.send_keys(Keys.TAB)
    button = page.switch_to.active_element
    assert (button.tag_name, button.text.split()[0]) == ("button", "model,")
    outline = button.value_of_css_property("outline-style")
    button.send_keys(Keys.ENTER)
    assert (models(page), outline) == (["best", "broken", "middle", "worst"], "solid")


def texts(page: Chrome, selector: str) -> list[str]:
    return [one.get_attribute("textContent") or "" for one in page.find_elements(By.CSS_SELECTOR, selector)]


def test_accuracy_against_bytes_has_two_points_a_version_and_three_round_byte_counts_or_more(page: Chrome) -> None:
    Select(page.find_element(By.ID, "accuracy-view")).select_by_value("top1")
    full, part = texts(page, "[data-chart=accuracy] g.full title"), texts(page, "[data-chart=accuracy] g.part title")
    assert full == [
        "timm.middle.w8-4: full-bit 59.50% in 4.00 MB",
        "timm.best.w8-4: full-bit 89.50% in 60.00 MB",
        "timm.worst.w8-4: full-bit 9.00% in 201.00 kB",
    ]
    assert part[1] == "timm.best.w8-4: part-bit 87.00% in 30.00 MB"
    ticks = texts(page, "[data-chart=accuracy] g[aria-label='x-axis tick label'] text")
    assert len(ticks) >= 3
    assert {"500 kB", "1 MB", "10 MB"} <= set(ticks), ticks
    assert {"middle", "best", "worst"} <= set(texts(page, "[data-chart=accuracy] g.name text"))


def test_versions_that_are_close_are_told_apart(browser: Chrome, tmp_path: Path) -> None:
    """From 0 to 100 the six of them were one flat line, and one byte count was all of the axis."""
    path = tmp_path / "close.html"
    close = [row(f"m{index}", top1=91.0 + index / 5, high=100_000 + 8_000 * index) for index in range(6)]
    path.write_text(render("close", close), encoding="utf-8")
    screen(browser, DESKTOP)
    browser.get(path.as_uri())
    Select(browser.find_element(By.ID, "accuracy-view")).select_by_value("top1")
    places = [
        float(one.get_attribute("cy") or "")
        for one in browser.find_elements(By.CSS_SELECTOR, "[data-chart=accuracy] g.full circle")
    ]
    assert len(places) == 6
    assert places == sorted(places, reverse=True)
    assert places[0] - places[-1] > 40
    assert len(texts(browser, "[data-chart=accuracy] g[aria-label='x-axis tick label'] text")) >= 3


def test_points_against_the_float_network_are_shown_first_where_it_was_measured(page: Chrome) -> None:
    assert Select(page.find_element(By.ID, "accuracy-view")).first_selected_option.get_attribute("value") == "lost"
    ticks = texts(page, "[data-chart=accuracy] g[aria-label='y-axis tick label'] text")
    assert {"\u22122", "\u22121", "0"} <= set(ticks)


def test_the_table_says_where_the_weights_are_from(browser: Chrome, tmp_path: Path) -> None:
    path = tmp_path / "weights.html"
    file = row("file", top1=60.0).model_copy(update={"revision": f"sha256:{'ab' * 32}"})
    seed = row("seed", top1=60.0).model_copy(update={"revision": "timm 1.0.31 random_seed 0"})
    path.write_text(render("weights", [file, seed]), encoding="utf-8")
    browser.get(path.as_uri())
    told = texts(browser, "#results tbody th small.wide")
    assert told == ["weights sha256:abababab…", "weights timm 1.0.31 random_seed 0"]


def test_layers_show_what_each_loses_and_follow_the_chosen_version(page: Chrome) -> None:
    choice = Select(page.find_element(By.ID, "version"))
    assert [option.text for option in choice.options] == ["middle · w8-4", "best · w8-4", "worst · w8-4"]
    choice.select_by_index(2)
    assert texts(page, "[data-chart=noise] g.figure title") == [
        "stem.conv: 432 weights, 8 over 4 bits, full-bit 40.3 dB, part-bit 12.5 dB",
        "a.long.qualified.name.of.some.block.conv: 9,216 weights, 8 over 4 bits, full-bit exact, part-bit 20.0 dB",
    ]
    assert (
        len(page.find_elements(By.CSS_SELECTOR, "[data-chart=noise] g.full path, [data-chart=noise] g.full circle"))
        == 1
    )


def test_damage_by_layer_follows_the_version_and_sorts_from_the_keyboard(page: Chrome) -> None:
    place = page.find_element(By.CSS_SELECTOR, "[data-chart=damage]")
    assert place.text == "Not measured: 'analysis' or 'quantize.mixed' in a job's spec does."
    Select(page.find_element(By.ID, "version")).select_by_index(2)
    first = "stem.conv: 432 weights, 8 over 4 bits, 0.0125 nats, 98.4% same answers, 1.56 points of top-1 lost"
    second = "a.long.qualified.name.of.some.block.conv: 9,216 weights, 8 over 4 bits, 0.0500 nats, 93.8% same answers"
    assert texts(page, "[data-chart=damage] g.bar title") == [first, second]
    bars = page.find_elements(By.CSS_SELECTOR, "[data-chart=damage] g.bar rect")
    widths = [float(bar.get_attribute("width") or "") for bar in bars]
    assert widths[0] / widths[1] == pytest.approx(0.25, abs=0.02)
    order = page.find_element(By.ID, "damage-order")
    order.send_keys(Keys.ARROW_DOWN)
    assert texts(page, "[data-chart=damage] g.bar title") == [second, first]


def test_nothing_breaks_out_and_nothing_is_asked_of_the_network(page: Chrome) -> None:
    assert texts(page, "td.error")[0] == HOSTILE
    assert page.title == "night <run>"
    loaded = page.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [name for name in loaded if not name.startswith("data:")] == []
    refused = page.execute_async_script(
        "const done = arguments[0];fetch('http://127.0.0.1:9/').then(() => done('asked'), error => done(error.message))"
    )
    assert "Failed to fetch" in refused
    assert any("Content Security Policy" in message for message in severe(page))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_axe_finds_nothing(page: Chrome, size: tuple[int, int], dark: bool) -> None:
    screen(page, size, dark=dark)
    page.refresh()
    assert axe_findings(page) == []


def test_on_a_narrow_screen_no_word_of_a_picture_is_cut(page: Chrome) -> None:
    screen(page, PHONE)
    page.refresh()
    Select(page.find_element(By.ID, "version")).select_by_index(2)
    pictures = page.find_elements(By.CSS_SELECTOR, ".chart > svg, .chart > figure > svg")
    assert len(pictures) == 3
    for picture in pictures:
        left, right, outer_left, outer_right, size = page.execute_script(
            "const outer = arguments[0].getBoundingClientRect();"
            "const words = [...arguments[0].querySelectorAll('text')].filter(one => one.textContent)"
            ".map(one => one.getBoundingClientRect());"
            "return [Math.min(...words.map(one => one.left)), Math.max(...words.map(one => one.right)),"
            "0, innerWidth, getComputedStyle(arguments[0].querySelector('text')).fontSize]",
            picture,
        )
        assert (left >= outer_left, right <= outer_right, size) == (True, True, "12px")
