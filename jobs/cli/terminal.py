"""The one way to a terminal for what comes from files, stores and networks: shown as it is, never obeyed."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text
from typing_extensions import override

from storage.wording import printable, without_secrets


class PlainConsole(Console):
    """rich's console without markup and emoji codes; strings lose control characters and secrets before they show.

    What is to look bold or coloured is a ``Text`` or a ``style``.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, **settings)

    @override
    def render_str(self, text: str, **settings: Any) -> Text:
        """Return a string as it may be shown; cells of tables come through here too."""
        settings["markup"] = settings["emoji"] = False
        return super().render_str(printable(without_secrets(text)), **settings)


def title(strong: str, rest: str = "") -> Text:
    """Return a line that begins with bold words."""
    return Text.assemble((printable(without_secrets(strong)), "bold"), printable(without_secrets(rest)))
