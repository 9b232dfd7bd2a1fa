"""HTML elements. All text is escaped: a ``str`` is text, and only :class:`Markup` is HTML."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence


class Markup(str):
    """HTML that is inserted unchanged."""

    __slots__ = ()


def escape(value: object) -> Markup:
    """Return the HTML of a value. :class:`Markup` is returned unchanged."""
    return value if isinstance(value, Markup) else Markup(html.escape(str(value)))


def join(parts: Iterable[object]) -> Markup:
    """Return the HTML of several values in sequence."""
    return Markup("".join(escape(part) for part in parts))


def tag(element: str, /, *children: object, **attributes: str | bool | None) -> Markup:
    """Return an element.

    Args:
        element: Name of the element.
        children: Its content.
        attributes: Its attributes. A trailing underscore is removed (``class_``); other underscores become hyphens. ``None``
            and ``False`` omit an attribute, ``True`` writes it without a value.
    """
    written = ""
    for key, value in attributes.items():
        if value is not None and value is not False:
            name = key.rstrip("_").replace("_", "-")
            written += f" {name}" if value is True else f' {name}="{html.escape(value)}"'
    if element in ("img", "input", "meta"):
        return Markup(f"<{element}{written}>")
    return Markup(f"<{element}{written}>{join(children)}</{element}>")


def table(caption: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> Markup:
    """Return a table in a scrollable box. The first cell of a row is its header; ``None`` is shown as a hyphen."""
    body = [
        tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:]))
        for row in ([cell if cell is not None else "-" for cell in row] for row in rows)
    ]
    head = tag("tr", *(tag("th", cell, scope="col") for cell in header))
    content = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *body))
    return tag("div", content, class_="scrolls", tabindex="0", role="region", aria_label=caption)


def description_list(pairs: Mapping[str, object]) -> Markup:
    """Return a list of names and values. Values that are ``None`` are omitted."""
    items = [tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs.items() if value is not None]
    return tag("dl", *items)


def note(text: str) -> Markup:
    """Return a paragraph with an explanation."""
    return tag("p", text, class_="note")


def section(name: str, title: str, *parts: object) -> Markup:
    """Return a section of the page. The navigation links to its heading."""
    return tag("section", tag("h2", title, id=f"{name}-title"), *parts, id=name, aria_labelledby=f"{name}-title")


def details(summary: str, *parts: object) -> Markup:
    """Return content that the reader can expand."""
    return tag("details", tag("summary", summary), *parts)
