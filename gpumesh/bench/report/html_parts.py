"""Parts of a page that every section of the report uses: escaped text, tables, and lists of terms. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from gpumesh.text.printable import printable

MAX_SENTENCES = 3000  # characters of a text of several sentences; a name or a message is shorter


def escape_text(value: object, limit: int = 300) -> str:
    """The value as text for the page, without control characters and markup of its own; ``limit`` characters of it."""
    return escape(printable(str(value), limit))


def html_table(column_names: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: Iterable[int] = ()) -> str:
    """Writes a table, or an empty text if there are no rows. The caller escapes the cells, this function the names.

    A row with one cell is the title of the rows after it. The cells of ``text_columns`` hold sentences: they are on the
    left, and have several lines if they are long.
    """
    sentences = frozenset(text_columns)
    body = ""
    for row in rows:
        if len(row) == 1 and len(column_names) > 1:
            body += f'<tr class="group"><th scope="rowgroup" colspan="{len(column_names)}">{row[0]}</th></tr>\n'
            continue
        cells = "".join(
            f'<td class="text">{cell}</td>' if index in sentences else f"<td>{cell}</td>"
            for index, cell in enumerate(row)
        )
        body += f"<tr>{cells}</tr>\n"
    if not body:
        return ""
    head = "".join(f'<th scope="col">{escape_text(name)}</th>' for name in column_names)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def html_terms(terms: Iterable[tuple[str, str]]) -> str:
    """Writes a list of terms with their texts, or an empty text if there are none. Escapes both."""
    rows = "".join(f"<dt>{escape_text(term)}</dt><dd>{escape_text(text, MAX_SENTENCES)}</dd>\n" for term, text in terms)
    return f"<dl>{rows}</dl>" if rows else ""
