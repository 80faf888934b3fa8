"""Style and scripts of the pages. A site has them as files beside it, a single page inside; neither asks the network.

``vendor/`` holds d3 7.9.2 and Observable Plot 0.6.17 as their authors publish them, each beside its licence (ISC).
"""

from __future__ import annotations

import base64
import functools
import hashlib
from dataclasses import dataclass
from importlib import resources


@dataclass(frozen=True, slots=True)
class Asset:
    """One file: where it stands below a site's root, named by its digest so that it never changes, and its text."""

    path: str
    text: str

    @property
    def source(self) -> str:
        """What a Content-Security-Policy calls the text where it stands inside a page (CSP level 3, hash-source)."""
        return f"'sha256-{base64.b64encode(hashlib.sha256(self.text.encode()).digest()).decode()}'"


STYLE = "style.css"
PAGE_SCRIPT = "page.js"
CHART_SCRIPTS = ("vendor/d3.min.js", "vendor/plot.min.js", "charts.js")
LICENCES = ("vendor/d3.LICENSE", "vendor/plot.LICENSE")


@functools.cache
def asset(name: str) -> Asset:
    """Return a file of this package."""
    text = resources.files("jobs.pages").joinpath(*name.split("/")).read_text(encoding="utf-8")
    stem, _, ending = name.rpartition("/")[2].partition(".")
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    # Keys of a store are lower case.
    return Asset(f"assets/{stem}.{digest}.{ending.lower()}", text)


def site_assets() -> list[Asset]:
    """Return every file that the pages of a site name, and the licences of what is not ours."""
    return [asset(name) for name in (STYLE, PAGE_SCRIPT, *CHART_SCRIPTS, *LICENCES)]
