"""The page as one file: its HTML with its style and scripts in it, and the policy that lets nothing else run.

``static/ui.html`` names its style and its scripts as usual. They are put in their places when the gateway starts, so a
browser loads one file, and the policy can name the hash of each part. A policy that allowed files from the gateway's
own address would be weaker: answers of nodes' hosts come from there too.
"""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources

_STYLE = re.compile(r'<link rel="stylesheet" href="([a-z_-]+\.css)">')
_SCRIPT = re.compile(r'<script src="([a-z_-]+\.js)"></script>')


def read_page() -> tuple[str, str]:
    """Returns the page and its Content-Security-Policy."""
    folder = resources.files("gpumesh.gateway").joinpath("static")
    hashes: dict[str, list[str]] = {"style": [], "script": []}

    def put_in(tag: str, name: str) -> str:
        text = folder.joinpath(name).read_text(encoding="utf-8")
        assert f"</{tag}" not in text.lower(), f"{name} would end its own element"
        digest = base64.b64encode(hashlib.sha256(f"\n{text}".encode()).digest()).decode()
        hashes[tag].append(f"'sha256-{digest}'")
        return f"<{tag}>\n{text}</{tag}>"

    html = folder.joinpath("ui.html").read_text(encoding="utf-8")
    html = _STYLE.sub(lambda match: put_in("style", match[1]), html)
    html = _SCRIPT.sub(lambda match: put_in("script", match[1]), html)
    policy = (
        f"default-src 'none'; script-src {' '.join(hashes['script'])}; style-src {' '.join(hashes['style'])}; "
        "img-src data:; connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )
    return html, policy
