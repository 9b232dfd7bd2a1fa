"""HTML in which every text is escaped: a string is text, only :class:`Markup` is HTML."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence


class Markup(str):
    """HTML that is inserted as it is."""

    __slots__ = ()


def text(value: object) -> Markup:
    """HTML of a value: escaped, unless it is HTML already."""
    return value if isinstance(value, Markup) else Markup(html.escape(str(value)))


def join(parts: Iterable[object]) -> Markup:
    """HTML of one thing after another."""
    return Markup("".join(text(part) for part in parts))


def tag(element: str, /, *children: object, **attributes: str | bool | None) -> Markup:
    """An element. ``class_`` and ``for_`` lose their underscore, others become hyphens; None leaves out."""
    written = ""
    for key, value in attributes.items():
        if value is not None and value is not False:
            called = key.rstrip("_").replace("_", "-")
            written += f" {called}" if value is True else f' {called}="{html.escape(value)}"'
    if element in ("img", "input", "meta"):
        return Markup(f"<{element}{written}>")
    return Markup(f"<{element}{written}>{join(children)}</{element}>")


def table(caption: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> Markup:
    """A table in a box that scrolls by itself; the first cell of a row names it."""
    body = [
        tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:]))
        for row in ([cell if cell is not None else "-" for cell in row] for row in rows)
    ]
    head = tag("tr", *(tag("th", cell, scope="col") for cell in header))
    content = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *body))
    return tag("div", content, class_="scrolls", tabindex="0", role="region", aria_label=caption)


def facts(pairs: Mapping[str, object]) -> Markup:
    """Names and values; those that are None are left out."""
    items = [tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs.items() if value is not None]
    return tag("dl", *items)


def note(words: str) -> Markup:
    """A paragraph that explains, or says what is missing."""
    return tag("p", words, class_="note")


def section(name: str, title: str, *parts: object) -> Markup:
    """A part of the page with a heading that the navigation leads to."""
    return tag("section", tag("h2", title, id=f"{name}-title"), *parts, id=name, aria_labelledby=f"{name}-title")


def disclosure(summary: str, *parts: object) -> Markup:
    """What is shown when asked for."""
    return tag("details", tag("summary", summary), *parts)
