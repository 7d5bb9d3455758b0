"""One HTML file with everything that it shows: no scripts, no fonts, no other files."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from gspn._files import printable, replaced

_STYLE = """
:root { --ink: #1f2430; --muted: #5b6270; --line: #e3e6ec; --wash: #f6f7f9; --accent: #2b5fd9; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #fff; font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 72px; }
h1 { font-size: 34px; line-height: 1.2; margin: 0 0 8px; letter-spacing: -0.01em; }
h2 { font-size: 22px; margin: 56px 0 6px; padding-top: 20px; border-top: 1px solid var(--line); }
p { margin: 6px 0 14px; max-width: 76ch; }
.lead { font-size: 18px; color: var(--muted); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 14px; margin: 26px 0 8px; }
.tile { background: var(--wash); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
.tile b { display: block; font-size: 26px; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tile span { color: var(--muted); font-size: 14px; }
figure { margin: 16px 0; }
figure img { max-width: 100%; height: auto; display: block; border-radius: 6px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 20px; align-items: start; }
figcaption { color: var(--muted); font-size: 14px; margin-top: 6px; max-width: 90ch; }
table { border-collapse: collapse; font-size: 15px; margin: 12px 0; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 14px 6px 0; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
th { color: var(--muted); font-weight: 600; }
.scroll { overflow-x: auto; }
code, pre { font: 14px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; background: var(--wash); }
code { padding: 1px 5px; border-radius: 4px; }
pre { padding: 12px 14px; border: 1px solid var(--line); border-radius: 8px; overflow-x: auto; }
footer { margin-top: 56px; color: var(--muted); font-size: 14px; border-top: 1px solid var(--line); padding-top: 16px; }
"""


def _text(text: str) -> str:
    """Any text in HTML, between tags or in quotes."""
    return escape(printable(text))


@dataclass
class Page:
    """A page that grows section by section.

    Args:
        title: The title of the page.
        lead: The paragraph below the title.
    """

    title: str
    lead: str
    _tiles: list[str] = field(default_factory=list)
    _parts: list[str] = field(default_factory=list)
    _footer: str = ""

    def tile(self, figure: str, meaning: str) -> None:
        """Add a number to the top of the page."""
        self._tiles.append(f'<div class="tile"><b>{_text(figure)}</b><span>{_text(meaning)}</span></div>')

    def section(self, heading: str, text: str) -> None:
        """Begin a section."""
        self._parts.append(f"<h2>{_text(heading)}</h2><p>{_text(text)}</p>")

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self._parts.append(f"<p>{_text(text)}</p>")

    def command(self, text: str) -> None:
        """Add a command to type."""
        self._parts.append(f"<pre>{_text(text)}</pre>")

    def images(self, *shown: tuple[Path, str]) -> None:
        """Add PNG files with their captions, side by side where there is room."""
        figures = "".join(
            f'<figure><img alt="{_text(caption)}" src="data:image/png;base64,'
            f'{base64.b64encode(path.read_bytes()).decode()}"><figcaption>{_text(caption)}</figcaption></figure>'
            for path, caption in shown
        )
        self._parts.append(f'<div class="pair">{figures}</div>' if len(shown) > 1 else figures)

    def table(self, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Add a table whose first column names the rows."""
        head = "".join(f"<th>{_text(one)}</th>" for one in headings)
        body = "".join("<tr>" + "".join(f"<td>{_text(one)}</td>" for one in row) + "</tr>" for row in rows)
        self._parts.append(f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>')

    def footer(self, text: str) -> None:
        """Set the footer: the machine of the measurements."""
        self._footer = _text(text)

    def write(self, path: Path) -> None:
        """Write the page, replacing a file as a whole."""
        html = (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{_text(self.title)}</title><style>{_STYLE}</style></head><body><main>"
            f'<h1>{_text(self.title)}</h1><p class="lead">{_text(self.lead)}</p>'
            f'<div class="tiles">{"".join(self._tiles)}</div>{"".join(self._parts)}'
            f"<footer>{self._footer}</footer></main></body></html>"
        )
        with replaced(path) as part:
            part.write_text(html, encoding="utf-8")
