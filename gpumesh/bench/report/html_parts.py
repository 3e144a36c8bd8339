"""Parts of a page that every section of the report uses: escaped text and tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from gpumesh.text.printable import printable


def escape_text(value: object) -> str:
    """The value as text for the page, without control characters and markup of its own."""
    return escape(printable(str(value)))


def html_table(column_names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Writes a table, or an empty text if there are no rows. The caller escapes the cells, this function the names."""
    body = ""
    for row in rows:
        cells = "".join(f"<td>{cell}</td>" for cell in row)
        body += f"<tr>{cells}</tr>\n"
    if not body:
        return ""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in column_names)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'
