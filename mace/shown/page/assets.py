"""The files of the page, and the page that holds its data inside.

Text is only ever put into HTML here, escaped; the page's scripts put all other text in with `textContent`.
"""

from __future__ import annotations

import base64
import hashlib
import html
from dataclasses import dataclass
from importlib.resources import files
from string import Template
from typing import Any, Final

from contracts import strict_json
from contracts.names import printable


@dataclass(frozen=True, slots=True)
class Asset:
    """One file of this package."""

    name: str
    media_type: str

    def read(self) -> bytes:
        """Return the file's bytes."""
        return files(__package__).joinpath(self.name).read_bytes()

    def text(self) -> str:
        """Return the file's text."""
        return self.read().decode("utf-8")


_STYLES: Final = tuple(Asset(name, "text/css") for name in ("uPlot.min.css", "page.css"))
_SCRIPTS: Final = tuple(
    Asset(name, "text/javascript") for name in ("uPlot.iife.min.js", "data.js", "charts.js", "page.js")
)
ASSETS: Final = {asset.name: asset for asset in (*_STYLES, *_SCRIPTS)}
"""The files that the page loads, by name."""


def _template(name: str) -> Template:
    return Template(Asset(name, "text/html").text())


def page(title: str, perfetto: str) -> str:
    """Return the page that reads its views from the server; `perfetto` is the address of the Perfetto UI."""
    head = "".join(f'<link rel="stylesheet" href="static/{asset.name}">\n' for asset in _STYLES)
    body = "".join(f'<script src="static/{asset.name}"></script>\n' for asset in _SCRIPTS)
    return _template("page.html").substitute(title=_escaped(title), perfetto=_escaped(perfetto), head=head, body=body)


def token_page(*, wrong: bool = False) -> str:
    """Return the page with the form for the token."""
    said = "That is not the token." if wrong else ""
    return _template("token.html").substitute(said=said)


def one_file(title: str, views: dict[str, Any], tables: str) -> str:
    """Return the page with its data inside, which loads nothing.

    `views` are the JSON values of views by their address. `tables` is shown as text where scripts do not run.
    """
    styles = [asset.text() for asset in _STYLES]
    scripts = [asset.text() for asset in _SCRIPTS]
    # Only exactly these scripts and styles may run: the data cannot add any, whatever the names in it.
    policy = (
        f"default-src 'none'; script-src {_hashes(scripts)}; style-src {_hashes(styles)}; img-src data:;"
        " base-uri 'none'; form-action 'none'"
    )
    data = strict_json.dumps({"views": views}).replace("<", "\\u003c")
    head = f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n' + "".join(
        f"<style>{text}</style>\n" for text in styles
    )
    body = (
        f"<noscript><pre>{_escaped(tables, lines=True)}</pre></noscript>\n"
        f'<script type="application/json" id="mace-data">{data}</script>\n'
        + "".join(f"<script>{text}</script>\n" for text in scripts)
    )
    return _template("page.html").substitute(title=_escaped(title), perfetto="", head=head, body=body)


def _hashes(texts: list[str]) -> str:
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
    return " ".join(f"'sha256-{digest}'" for digest in digests)


def _escaped(text: str, *, lines: bool = False) -> str:
    if lines:
        return "\n".join(html.escape(printable(line)) for line in text.split("\n"))
    return html.escape(printable(text))
