"""Reports: web pages in one file, with pictures and tables, that can be read in the dark, and on a telephone."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import numpy
from numpy.typing import ArrayLike

from vmad_lit.core.error import needed_for
from vmad_lit.lib.files import Path, replacing

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #fdfdfc; --line: #d5d5d2; --pale: #f1f1ee; --blue: #1f68ab; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #dcdcd8; --paper: #17191b; --line: #3a3d40; --pale: #212427; --blue: #78b4ea; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 1rem 0 0.3rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 0.6rem; padding-top: 0.6rem; border-top: 1px solid var(--line); }
nav a { color: var(--blue); margin-right: 0.9rem; white-space: nowrap; }
.row { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(17rem, 100%), 1fr)); }
figure { margin: 0.5rem 0; min-width: 0; max-width: 34rem; }
figure img { width: 100%; height: auto; display: block; }
figcaption, caption { font-size: 0.85rem; opacity: 0.85; text-align: left; padding: 0.3rem 0; }
.scroll { overflow-x: auto; margin: 0.5rem 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
th, td { padding: 0.2rem 0.8rem 0.2rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; white-space: nowrap; }
pre { overflow-x: auto; background: var(--pale); padding: 0.7rem; font-size: 0.8rem; line-height: 1.35; }
details summary { cursor: pointer; }
"""


class Report:
    """A page that grows from top to bottom. Each method adds a part, and returns the report.

    Parameters
    ----------
    title, subtitle : str
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title, self.subtitle = title, subtitle
        self.parts: list[str] = []
        self.sections: dict[str, str] = {}

    def section(self, heading: str) -> Self:
        """Begin a section, which the page's list of sections leads to."""
        name = re.sub(r"[^a-z0-9]+", "-", heading.lower()).strip("-") or "section"
        name = name if name not in self.sections else f"{name}-{len(self.sections)}"
        self.sections[name] = heading
        return self._add(f'<h2 id="{name}">{escape(heading)}</h2>')

    def text(self, *sentences: str) -> Self:
        """A paragraph."""
        return self._add(f"<p>{escape(' '.join(sentences))}</p>")

    def code(self, text: str, summary: str | None = None) -> Self:
        """A text as it is; with a `summary`, folded away under it."""
        pre = f"<pre>{escape(text)}</pre>"
        if summary is not None:
            pre = f"<details><summary>{escape(summary)}</summary>{pre}</details>"
        return self._add(pre)

    def table(self, head: Sequence[str], rows: Iterable[Sequence[Any]], caption: str = "") -> Self:
        """A table; numbers are written with four digits, and to the right."""
        rows = [list(row) for row in rows]
        kinds = [rows and all(is_number(row[i]) for row in rows) for i in range(len(head))]

        def line(tag: str, cells: Sequence[Any]) -> str:
            marks = [' class="number"' if kind else "" for kind in kinds]
            return "".join(f"<{tag}{m}>{escape(told(cell))}</{tag}>" for m, cell in zip(marks, cells))

        body = "".join(f"<tr>{line('td', row)}</tr>\n" for row in rows)
        titled = f"<caption>{escape(caption)}</caption>" if caption else ""
        head = f"<thead><tr>{line('th', head)}</tr></thead>" if any(head) else ""
        return self._add(f'<div class="scroll"><table>{titled}{head}<tbody>\n{body}</tbody></table></div>')

    def pictures(self, *pictures: tuple[str, str, str]) -> Self:
        """Pictures beside each other where there is room: of each the address, the alternative text and the caption."""
        figures = "".join(
            f'<figure><img src="{address}" alt="{escape(alt)}"><figcaption>{escape(caption)}</figcaption></figure>\n'
            for address, alt, caption in pictures
        )
        return self._add(f'<div class="row">\n{figures}</div>')

    def _add(self, part: str) -> Self:
        self.parts.append(part)
        return self

    def __str__(self) -> str:
        links = "".join(
            f'<a href="#{name}">{escape(heading)}</a> ' for name, heading in self.sections.items()
        )
        return "\n".join(
            [
                '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
                '<meta name="viewport" content="width=device-width, initial-scale=1">',
                f"<title>{escape(self.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
                f"<h1>{escape(self.title)}</h1>\n<p>{escape(self.subtitle)}</p>\n<nav>{links}</nav>",
                *self.parts,
                "</body>\n</html>\n",
            ]
        )

    def save(self, path: Path) -> None:
        """Write the page."""
        with replacing(path) as file:
            file.write(str(self).encode())


def escape(text: str) -> str:
    """Text in HTML."""
    return html.escape(text)


def is_number(value: Any) -> bool:
    """Whether a cell of a table is a number."""
    return isinstance(value, (int, float, numpy.integer, numpy.floating)) and not isinstance(value, bool)


def told(value: Any) -> str:
    """A cell of a table."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (float, numpy.floating)):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple, numpy.ndarray)):
        return ", ".join(map(told, value))
    return str(value)


# Pictures
COLOURS = "#3b82c4", "#d0701f", "#3f9b6b", "#b05cc0", "#a08400"
GREY = "#8a8a8a"


@contextmanager
def drawing(width: float, height: float, where: list[str], kind: str = "svg") -> Iterator[Any]:
    """Axes on a transparent ground, whose ink reads on white and on black; the address of the picture is put into the
    list `where` at the end of the block."""
    with needed_for("the pictures", extra="output"):
        from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    ax = figure.subplots()
    ax.tick_params(which="both", labelsize=8)
    yield ax
    where.append(picture_of(figure, kind))


def picture_of(figure: Any, kind: str = "svg") -> str:
    """The address of a picture of a figure of Matplotlib, which holds the picture itself, 'svg' or 'png'."""
    figure.patch.set_alpha(0)
    for ax in figure.axes:
        ax.patch.set_alpha(0)
        ax.tick_params(colors=GREY, which="both")
        for part in (*ax.spines.values(), ax.xaxis.label, ax.yaxis.label):
            part.set_color(GREY)
    memory = io.BytesIO()
    date: Any = {"Date": None} if kind == "svg" else None
    figure.savefig(memory, format=kind, dpi=110, metadata=date)
    mime = dict(svg="image/svg+xml", png="image/png")[kind]
    return f"data:{mime};base64,{base64.b64encode(memory.getvalue()).decode()}"


def map_picture(image: ArrayLike, sides: Sequence[float], centre: float, width: float) -> str:
    """The address of a picture of a map; colours reach from centre - width to centre + width."""
    where: list[str] = []
    colours = dict(vmin=centre - width, vmax=centre + width, cmap="magma" if centre else "RdBu_r")
    with drawing(3.4, 3.4, where, "png") as ax:
        ax.imshow(image, origin="lower", extent=[0, sides[1], 0, sides[0]], **colours)
        ax.set_xlabel("Mpc/h", fontsize=8)
    return where[0]


def curve_picture(
    x: ArrayLike,
    curves: Mapping[str, ArrayLike],
    xlabel: str,
    ylabel: str,
    bands: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
    **settings: Any,
) -> str:
    """The address of a picture of curves over x, on top of bands between a low and a high one. One whose name begins with a
    space is dashed, and has the colour of the one before; `settings` are those of Matplotlib's axes."""
    where: list[str] = []
    number = -1

    with drawing(5.2, 3.4, where) as ax:
        for (name, (low, high)), alpha in zip((bands or {}).items(), (0.25, 0.35)):
            ax.fill_between(x, low, high, color=COLOURS[0], alpha=alpha, lw=0, label=name)
        for name, y in curves.items():
            number += name[:1] != " "
            colour = COLOURS[number % len(COLOURS)]
            ax.plot(x, y, color=colour, ls="--" if name[:1] == " " else "-", lw=1.5, label=name.strip())
        ax.set(**settings)
        ax.set(xlabel=xlabel, ylabel=ylabel)
        ax.legend(frameon=False, labelcolor=GREY, fontsize=8)
    return where[0]
