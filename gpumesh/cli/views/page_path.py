"""Where the gateway's page is."""

from __future__ import annotations

PAGE_PATH = "/ui"


def page_note(gateway_url: str) -> str:
    """What to add to the gateway's address where it is shown. Empty for a Unix socket, which no browser can open."""
    return f" (page: {PAGE_PATH})" if gateway_url.startswith("http") else ""
