"""What a page is made of: sections, figures, tables, and numbers as people read them."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Figure", "Notice", "Section", "Table", "Tile", "figure", "number", "table"]


@dataclass(frozen=True)
class Tile:
    """One headline number."""

    label: str
    value: str


@dataclass(frozen=True)
class Notice:
    """A sentence that must not be missed: a warning, or a claim that holds."""

    text: str
    good: bool = False


@dataclass(frozen=True)
class Figure:
    """A PNG in base64, and how wide it stands on a wide screen: ``"half"`` or ``"third"``."""

    alt: str
    data: str
    width: str


@dataclass(frozen=True)
class Table:
    """Rows of finished text; ``classes`` says of every column whether it holds a ``"number"`` or ``"text"``."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    classes: Sequence[str]
    title: str = ""


@dataclass
class Section:
    """One box of the page."""

    title: str
    text: list[str] = field(default_factory=list)
    notices: list[Notice] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


def figure(png: bytes, alt: str, width: str = "half") -> Figure:
    """A plot's bytes as a figure of the page."""
    return Figure(alt, base64.b64encode(png).decode("ascii"), width)


def number(value: Any) -> str:
    """A number to four significant digits or more, anything else as it is written; None as a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(number(item) for item in value) + "]"
    return str(value)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], *, title: str = "") -> Table:
    """A table whose columns of numbers are set to the right."""
    classes = []
    for column in zip(*rows, strict=True):
        numeric = all(
            value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)) for value in column
        )
        classes.append("number" if numeric else "text")
    return Table(header, [[number(value) for value in row] for row in rows], classes or ["text"] * len(header), title)
