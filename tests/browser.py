"""A real browser for tests of pages, and what axe-core says of one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome, ChromeOptions, ChromeService

DESKTOP, PHONE = (1400, 900), (390, 844)
_AXE = Path(__file__).parent / "vendor" / "axe" / "axe.min.js"


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    """Headless Chromium that keeps its log."""
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
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = Chrome(options=options, service=ChromeService(driver))
    yield opened
    opened.quit()


def screen(browser: Chrome, size: tuple[int, int], *, dark: bool = False) -> None:
    """Make the window a desktop's or a phone's, light or dark."""
    width, height = size
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def axe_findings(browser: Chrome) -> list[list[Any]]:
    """Return rule, impact and first place of everything that axe-core holds against the page."""
    browser.execute_script(_AXE.read_text(encoding="utf-8"))
    found: list[list[Any]] = browser.execute_async_script(
        "const done = arguments[0]; axe.run({preload: false}).then(result => done("  # its preload asks for our style
        "result.violations.map(one => [one.id, one.impact, one.nodes[0].html])))"
    )
    return found


def severe(browser: Chrome) -> list[str]:
    """Return what the browser's log holds of errors since it was last read."""
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
