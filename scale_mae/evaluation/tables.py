"""Text tables for terminals, Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Format = Literal["terminal", "markdown", "latex"]
_LATEX = {
    "\\": r"\textbackslash{}",
    "±": r"$\pm$",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{c: rf"\{c}" for c in "&%$#_{}"},
}


@dataclass(frozen=True)
class Table:
    """A header, rows, and an optional line ``note`` below them."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def render(self, form: Format = "terminal") -> str:
        """Return the table as text, without a final newline."""
        if form == "latex":
            return self._latex()
        lines = [self.header, *self.rows]
        if form == "markdown":
            lines = [[cell.replace("|", r"\|") for cell in line] for line in lines]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.header))]
        padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
        if form == "markdown":
            rule = ["-" * max(3, width) for width in widths]
            text = [f"| {' | '.join(line)} |" for line in [padded[0], rule, *padded[1:]]]
        else:
            text = ["  ".join(line).rstrip() for line in [padded[0], ["-" * width for width in widths], *padded[1:]]]
        return "\n".join([*text, *([("\n" if form == "markdown" else "") + self.note] if self.note else [])])

    def _latex(self) -> str:
        lines = [
            " & ".join("".join(_LATEX.get(c, c) for c in cell) for cell in line) + r" \\" for line in (self.header, *self.rows)
        ]
        body = [rf"\begin{{tabular}}{{{'l' * len(self.header)}}}", r"\hline", lines[0], r"\hline", *lines[1:], r"\hline"]
        note = [f"% {self.note}"] if self.note else []
        return "\n".join([*body, r"\end{tabular}", *note])
