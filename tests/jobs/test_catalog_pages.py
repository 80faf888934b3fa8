"""The catalogue in a real browser: nothing asked of the network, axe-core, the keyboard, a phone, a thousand models."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from selenium.webdriver import Chrome, Keys
from selenium.webdriver.common.by import By

from jobs.catalog.destination import SiteFolder
from jobs.catalog.site import build_site
from jobs.zoo.ledger import ZooLedger
from storage.manifest import canonical_json
from storage.registry import Registry
from storage.stores.local import LocalStore
from tests.browser import DESKTOP, PHONE, axe_findings, screen, severe
from tests.jobs.catalog_store import break_things, report, signed_store
from tests.jobs.test_zoo_report import ROWS
from tests.storage.artifacts import make_draft

MADE = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)
PAGES = {
    "index": "index.html",
    "model": "models/net/index.html",
    "version": "models/net/2/index.html",
    "unmeasured": "models/plain/1/index.html",
    "hostile": "models/hostile/1/index.html",
    "broken": "models/rotten/index.html",
    "zoo": "zoo/nightly/index.html",
}


def write_site(store: LocalStore, folder: Path) -> Path:
    with SiteFolder(folder) as out:
        build_site(store, out, address="https://cdn.example/x", title="Ours", time=MADE)
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("catalog")
    store = signed_store(folder)
    break_things(store)
    ZooLedger(store, "nightly").write_tables(ROWS)
    return write_site(store, folder / "site")


@pytest.fixture
def calm(browser: Chrome) -> Iterator[Chrome]:
    severe(browser)
    screen(browser, DESKTOP)
    yield browser
    assert severe(browser) == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("page", PAGES)
def test_axe_finds_nothing_and_all_fits(calm: Chrome, site: Path, page: str, size: tuple[int, int], dark: bool) -> None:
    screen(calm, size, dark=dark)
    calm.get((site / PAGES[page]).as_uri())
    calm.execute_script("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    assert axe_findings(calm) == []
    assert calm.execute_script("return document.documentElement.scrollWidth") <= size[0]
    for place in calm.find_elements(By.CSS_SELECTOR, ".scroll"):
        inner, outer = calm.execute_script("return [arguments[0].scrollWidth, arguments[0].clientWidth]", place)
        assert inner <= outer or page == "hostile", place.get_attribute("aria-label")


@pytest.mark.parametrize("page", PAGES)
def test_no_request_leaves_and_no_strangers_script_runs(calm: Chrome, site: Path, page: str) -> None:
    calm.get_log("performance")
    calm.get((site / PAGES[page]).as_uri())
    assert calm.title != "owned"
    events = [json.loads(entry["message"])["message"] for entry in calm.get_log("performance")]
    sent = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert len(sent) >= 3
    assert [url for url in sent if not url.startswith((site.as_uri(), "data:"))] == []


def test_the_policy_refuses_what_would_leave(browser: Chrome, site: Path) -> None:
    browser.get((site / "index.html").as_uri())
    refused = browser.execute_async_script(
        "const done = arguments[0];"
        "addEventListener('securitypolicyviolation', event => done(event.violatedDirective));"
        "const image = new Image(); image.src = 'http://127.0.0.1:9/x.png'; document.body.append(image);"
    )
    assert refused == "img-src"
    severe(browser)


def test_the_site_works_from_a_web_server_too(calm: Chrome, site: Path) -> None:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *words: object) -> None:  # noqa: A002
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        calm.get(f"http://127.0.0.1:{server.server_port}/index.html")
        calm.find_element(By.LINK_TEXT, "net").click()
        calm.find_element(By.LINK_TEXT, "2").click()
        assert calm.title == "net version 2 · Ours"
        assert len(calm.find_elements(By.CSS_SELECTOR, "[data-chart=noise] g.part path")) == 2
    finally:
        server.shutdown()
        server.server_close()


def names(browser: Chrome) -> list[str]:
    shown = browser.find_elements(By.CSS_SELECTOR, "#models tbody:not([hidden]) th a")
    return [one.text for one in shown]


def test_the_keyboard_searches_sorts_and_opens(calm: Chrome, site: Path) -> None:
    calm.get((site / "index.html").as_uri())
    focus = calm.switch_to.active_element
    focus.send_keys(Keys.TAB)
    assert calm.switch_to.active_element.text == "To the content"
    seen = []
    while (focus := calm.switch_to.active_element).get_attribute("data-filters") != "models":
        seen.append(focus.text)
        focus.send_keys(Keys.TAB)
        assert len(seen) < 5
    focus.send_keys("unre")
    assert names(calm) == ["unreported"]
    assert calm.find_element(By.ID, "models-shown").text == "1 of 8"
    focus.send_keys(Keys.BACKSPACE * 4)
    while not (focus := calm.switch_to.active_element).text.startswith("part-bit bytes"):
        focus.send_keys(Keys.TAB)
    focus.send_keys(Keys.ENTER)
    bars = [one.get_attribute("data-value") for one in calm.find_elements(By.CSS_SELECTOR, "#models td:nth-child(6)")]
    known = [int(value or "") for value in bars if value]
    assert known == sorted(known, reverse=True)
    assert bars[-2:] == ["", ""]
    while (focus := calm.switch_to.active_element).text != "net":
        focus.send_keys(Keys.TAB)
    outline = focus.value_of_css_property("outline-style")
    focus.send_keys(Keys.ENTER)
    assert (calm.title, outline) == ("net · Ours", "solid")


def test_what_is_not_measured_says_so_and_what_measures_it(calm: Chrome, site: Path) -> None:
    calm.get((site / PAGES["unmeasured"]).as_uri())
    text = calm.find_element(By.TAG_NAME, "main").text
    assert "nestquant evaluate plain@1 --data IMAGES --store https://cdn.example/x prints its top-1" in text
    assert text.count("not measured") == 3 + 2
    assert "nestquant sign plain --version 1" in text
    assert "nestquant pull plain@1 --store https://cdn.example/x --allow-unsigned" in text


def test_a_signature_that_has_ended_says_so_when_the_page_is_read(browser: Chrome, site: Path, tmp_path: Path) -> None:
    page = (site / PAGES["version"]).read_text()
    place = site / "models" / "net" / "2" / "later.html"
    place.write_text(page.replace('data-ends="20', 'data-ends="19'))
    try:
        browser.get(place.as_uri())
        assert browser.find_element(By.CSS_SELECTOR, ".badge.signed").text == "signed (ended)"
        browser.get((site / PAGES["version"]).as_uri())
        assert browser.find_element(By.CSS_SELECTOR, ".badge.signed").text == "signed"
    finally:
        place.unlink()


def test_a_version_page_draws_its_layers_and_names_its_keys(calm: Chrome, site: Path) -> None:
    calm.get((site / PAGES["version"]).as_uri())
    titles = calm.find_elements(By.CSS_SELECTOR, "[data-chart=noise] g.figure title")
    assert [one.get_attribute("textContent") for one in titles] == [
        "conv0: 1,152 weights, 8 over 4 bits, full-bit 38.3 dB, part-bit 14.5 dB",
        "conv1: 1,152 weights, 8 over 4 bits, full-bit exact, part-bit 15.5 dB",
    ]
    assert len(calm.find_elements(By.CSS_SELECTOR, "[data-chart=damage] g.bar rect")) == 1
    text = calm.find_element(By.TAG_NAME, "main").text
    assert "Edition 1 vouches for exactly this manifest." in text
    assert text.count("\nkey ") == 3
    copy = calm.find_element(By.CSS_SELECTOR, ".snippet .copy")
    copy.click()
    assert calm.execute_async_script(
        "const [button, done] = arguments; setTimeout(() => done(button.textContent), 300)", copy
    ) in ("Copied", "Marked")


def thousand(folder: Path) -> LocalStore:
    """Return a store of 1,000 models that share their blobs; each has a manifest and a report of its own."""
    store = LocalStore(folder / "store")
    registry = Registry(store)
    draft = make_draft(registry)
    for number in range(1000):
        name = f"model-{number:04d}"
        one = draft.model_copy(update={"name": name, "recipe": {"seed": number}})
        store.put(f"models/{name}/versions/00000001.json", canonical_json(one), mode="create")
        report(store, name, 1, part=100 + number % 90)
    return store


def test_a_thousand_models_are_searched_at_once(calm: Chrome, tmp_path: Path) -> None:
    site = write_site(thousand(tmp_path), tmp_path / "site")
    assert (site / "index.html").stat().st_size < 4_000_000
    calm.get((site / "index.html").as_uri())
    assert len(names(calm)) == 100
    assert calm.find_element(By.ID, "models-shown").text == "1,000 of 1,000"
    box = calm.find_element(By.CSS_SELECTOR, "input[data-filters=models]")
    box.send_keys("model-0042")
    assert names(calm) == ["model-0042"]
    calm.find_element(By.CSS_SELECTOR, "#models th:nth-child(3) button").click()
    box.clear()
    box.send_keys(" ")
    best = calm.find_element(By.CSS_SELECTOR, "#models tbody td:nth-child(3)")
    assert best.get_attribute("data-value") == "94.5"
    dots = calm.find_elements(By.CSS_SELECTOR, "[data-chart=accuracy] g.full circle")
    assert len(dots) == 1000
    more = calm.find_element(By.CSS_SELECTOR, "button.more")
    assert more.text == "Show all 1,000"
    more.send_keys(Keys.ENTER)
    assert len(calm.find_elements(By.CSS_SELECTOR, "#models tbody:not([hidden])")) == 1000
    assert not more.is_displayed()
    screen(calm, PHONE)
    calm.refresh()
    assert calm.execute_script("return document.documentElement.scrollWidth") <= PHONE[0]
