"""A report: figures, tables and words of a run in one file that needs no other."""

from __future__ import annotations

import base64
import html
import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.image
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

DPI = 130
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #111; background: #fff; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; }
table { border-collapse: collapse; margin: 0.8rem 0; font-size: 0.92rem; }
th, td { border-bottom: 1px solid #ccc; padding: 0.2rem 1.2rem 0.2rem 0; text-align: left; vertical-align: top; }
img { max-width: 100%; height: auto; }
figure { margin: 1rem 0; }
figcaption { color: #444; font-size: 0.92rem; }
"""


class Section(NamedTuple):
    """One part of a report.

    Fields:
      heading: in a few words; names the figure too.
      figure: a matplotlib figure or axes of it; None for a part without.
      text: what there is to say, blank lines between paragraphs.
      table: rows of cells, the first row the header; None for a part without.
    """

    heading: str
    figure: Any = None
    text: str = ""
    table: Sequence[Sequence[Any]] | None = None


def report(path: str | Path, *, title: str, sections: Sequence[Any], settings: Mapping[str, Any] | None = None) -> Path:
    """Writes one file that holds all of a run: HTML with the pictures in it, or one PNG of all figures.

    The HTML has the settings, a table of figures and the sections; it loads nothing, from the net or from disk.
    The PNG has the title, the settings and the figures in two columns, without texts and tables.

    Args:
      path: ends in .html or .png.
      title: of the page.
      sections: `Section`s, or tuples of its fields (heading, figure, text, table) from the front.
      settings: what was run, such as the cell, its sizes and the dtype.

    Returns:
      The path.  The figures stay open.

    Raises:
      ValueError: another ending, no sections, something that is no figure; a PNG without any figure.

    Example:
      >>> import pathlib, tempfile
      >>> from matplotlib.figure import Figure
      >>> from rnncore.analysis import plots
      >>> ax = plots.saliency([[0.5], [1.0]], ax=Figure().subplots())
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = plots.report(
      ...         pathlib.Path(folder, "run.html"), title="A run", sections=[("Saliency", ax)], settings={"T": 2}
      ...     )
      ...     "data:image/png;base64," in path.read_text(encoding="utf-8")
      True
    """
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm", ".png"):
        raise ValueError(f"`report({path.name!r})`: expected a name that ends in .html or .png.")
    parts = [_section(one) for one in sections]
    if not parts:
        raise ValueError("`report(sections=[])`: nothing to write; expected at least one section.")
    facts = {str(name): str(value) for name, value in (settings or {}).items()}
    if path.suffix.lower() == ".png":
        path.write_bytes(_sheet(title, facts, [part for part in parts if part.figure is not None]))
    else:
        path.write_text(_page(title, facts, parts), encoding="utf-8")
    return path


def _section(one: Any) -> Section:
    if isinstance(one, str) or not isinstance(one, Sequence) or not 1 <= len(one) <= 4:
        raise ValueError(f"`report(sections=[<{type(one).__name__}>])`: expected (heading, figure, text, table).")
    part = Section(*one)
    figure = part.figure.figure if isinstance(part.figure, Axes) else part.figure
    if figure is not None and not hasattr(figure, "savefig"):
        raise ValueError(
            f"`report(sections=[({part.heading!r}, <{type(part.figure).__name__}>)])`: expected a figure, axes or None."
        )
    return part._replace(figure=figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white")
    return buffer.getvalue()


def _page(title: str, facts: Mapping[str, str], parts: Sequence[Section]) -> str:
    figures = [part.heading for part in parts if part.figure is not None]
    body = [f"<h1>{html.escape(title)}</h1>"]
    if facts:
        body += ["<h2>Settings</h2>", _table([("setting", "value"), *facts.items()])]
    if figures:
        items = [f'<li><a href="#figure-{i}">{html.escape(name)}</a></li>' for i, name in enumerate(figures, 1)]
        body += ["<h2>Figures</h2>", "<ol>", *items, "</ol>"]
    number = 0
    for part in parts:
        heading = html.escape(part.heading)
        body.append(f"<h2>{heading}</h2>")
        body += [f"<p>{html.escape(text.strip())}</p>" for text in part.text.split("\n\n") if text.strip()]
        if part.figure is not None:
            number += 1
            code = base64.b64encode(_png(part.figure)).decode("ascii")
            body += [
                f'<figure id="figure-{number}"><img alt="{heading}" src="data:image/png;base64,{code}">',
                f"<figcaption>Figure {number}. {heading}</figcaption></figure>",
            ]
        if part.table is not None:
            body.append(_table(part.table))
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return "\n".join(["<!doctype html>", f'<html lang="en"><head>{head}</head>', "<body>", *body, "</body></html>", ""])


def _table(rows: Sequence[Sequence[Any]]) -> str:
    cells = [
        "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row)
        for tag, row in zip(["th"] + ["td"] * len(rows), rows, strict=False)
    ]
    return "\n".join(["<table>", *(f"<tr>{row}</tr>" for row in cells), "</table>"])


def _sheet(title: str, facts: Mapping[str, str], parts: Sequence[Section]) -> bytes:
    """The pictures side by side on white, two in a row, under a head of text."""
    if not parts:
        raise ValueError("`report('....png')`: no section has a figure, and a PNG shows nothing else; write .html.")
    pictures = [_pixels(_png(part.figure)) for part in parts]
    column = max(picture.shape[1] for picture in pictures)
    width = column * min(2, len(pictures))
    lines = [line for name, value in facts.items() for line in textwrap.wrap(f"{name}: {value}", width // 9)]
    cells = [
        np.concatenate([_words(column, [(f"{i}. {part.heading}", 11)]), _padded(picture, picture.shape[0], column)])
        for i, (part, picture) in enumerate(zip(parts, pictures, strict=True), 1)
    ]
    bands = [_words(width, [(title, 15), *((line, 9) for line in lines)])]
    for i in range(0, len(cells), 2):
        row = cells[i : i + 2]
        height = max(cell.shape[0] for cell in row)
        band = np.concatenate([_padded(cell, height, column) for cell in row], 1)
        bands.append(_padded(band, height, width))
    buffer = io.BytesIO()
    matplotlib.image.imsave(buffer, np.concatenate(bands), format="png", dpi=DPI)
    return buffer.getvalue()


def _words(width: int, lines: Sequence[tuple[str, int]]) -> np.ndarray:
    """Lines of text with their sizes in points as a strip so many pixels wide."""
    heights = [1.7 * size / 72 for _, size in lines]
    figure = Figure(figsize=(width / DPI, sum(heights) + 0.2))
    top = 1.0 - 0.1 / figure.get_figheight()
    for (text, size), height in zip(lines, heights, strict=True):
        # Dollars are letters here, not mathematics.
        figure.text(0.01, top, text, va="top", fontsize=size, parse_math=False)
        top -= height / figure.get_figheight()
    picture = _pixels(_png(figure))
    return _padded(picture[:, :width], picture.shape[0], width)


def _pixels(png: bytes) -> np.ndarray:
    return matplotlib.image.imread(io.BytesIO(png))[..., :3]


def _padded(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.pad(picture, ((0, height - picture.shape[0]), (0, width - picture.shape[1]), (0, 0)), constant_values=1.0)
