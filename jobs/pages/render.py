"""Pages from templates: everything that is filled in is escaped, so that a stranger's word stays a word."""

from __future__ import annotations

import functools
from datetime import UTC, datetime
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from jobs.pages.assets import CHART_SCRIPTS, PAGE_SCRIPT, STYLE, asset
from storage.wording import size


def render_site_page(template: str, *, root: str, charts: bool, **context: Any) -> str:
    """Return a page of a site; ``root`` leads from it to the site's top (``""`` or ``"../"``...)."""
    return _render(template, root=root, charts=charts, script_sources="'self'", inline=False, **context)


def render_single_page(template: str, *, charts: bool, **context: Any) -> str:
    """Return a page that has style and scripts inside."""
    sources = " ".join(asset(name).source for name in _scripts(charts))
    return _render(template, root="", charts=charts, script_sources=sources, inline=True, **context)


def _scripts(charts: bool) -> tuple[str, ...]:
    return (PAGE_SCRIPT, *CHART_SCRIPTS) if charts else (PAGE_SCRIPT,)


def _render(template: str, *, charts: bool, inline: bool, script_sources: str, **context: Any) -> str:
    # Style may stand in attributes: bars have their length there, and Plot draws its pictures with it.
    styles = "'unsafe-inline'" if inline else "'self' 'unsafe-inline'"
    policy = f"default-src 'none'; style-src {styles}; script-src {script_sources}; img-src data:; base-uri 'none'"
    scripts = [asset(name) for name in _scripts(charts)]
    page = _environment().get_template(template)
    return page.render(policy=policy, inline=inline, style=asset(STYLE), scripts=scripts, **context)


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("jobs.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["size"] = size
    environment.filters["count"] = lambda number: f"{number:,}"
    environment.filters["day"] = _day
    environment.filters["instant"] = _instant
    return environment


def _day(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def _instant(moment: datetime) -> str:
    """Return what a machine reads (HTML, valid global date and time string)."""
    return f"{moment.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"
