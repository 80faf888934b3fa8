"""What the built documentation asks of the network: nothing. ``python -m tests.site build/site``."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

from typing_extensions import override

# Attributes that a browser follows by itself; a link that a person clicks (<a href>) may lead anywhere.
_LOADED = {("script", "src"), ("img", "src"), ("link", "href"), ("iframe", "src"), ("source", "src"), ("video", "src")}
_OUTSIDE = re.compile(r"^\s*(https?:)?//", re.IGNORECASE)
_IN_STYLES = re.compile(r"(?:url\(\s*['\"]?|@import\s+['\"])((?:https?:)?//[^'\")\s]+)", re.IGNORECASE)


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    @override
    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        relation = dict(attrs).get("rel")
        for name, value in attrs:
            if (tag, name) in _LOADED and relation != "canonical" and value and _OUTSIDE.match(value):
                self.asked.append(value)


def outside_requests(site: Path) -> list[str]:
    """Return ``file: address`` for everything in a site that a browser would load from elsewhere."""
    found = []
    for path in sorted(site.rglob("*")):
        if path.suffix == ".html":
            page = _Page()
            page.feed(path.read_text(encoding="utf-8"))
            asked = page.asked
        elif path.suffix == ".css":
            asked = _IN_STYLES.findall(path.read_text(encoding="utf-8"))
        else:
            continue
        found += [f"{path.relative_to(site)}: {address}" for address in asked]
    return found


if __name__ == "__main__":
    outside = outside_requests(Path(sys.argv[1]))
    sys.exit("\n".join(["The site asks for addresses outside of it:", *outside]) if outside else 0)
