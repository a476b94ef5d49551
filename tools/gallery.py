"""The gallery's pages as notebooks to download, and their thumbnails.

As a Sphinx extension, it writes a notebook for each page of ``book/gallery`` into ``_build/notebooks`` before pages are
read; a page links to its own by ``{download}``.  A notebook has the page's text as plain Markdown, and its cells, which
need the installed package and nothing of this repository.  From the command line,

    python -m tools.gallery notebooks _build/notebooks
    python -m tools.gallery thumbnails                    # draws book/gallery/thumbnails/*.png anew
"""

from __future__ import annotations

import re
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GALLERY = ROOT / "book" / "gallery"
NOTEBOOKS = ROOT / "_build" / "notebooks"

#: The longest program of a page, in lines that are neither empty nor magics of IPython.
LINES = 60

NOTE = """*This is a page of the book of vmad_lit as a notebook. It needs the package with its extras,
`pip install '.[all]'` in the folder of the project (see its README), and Jupyter.*"""


def pages() -> list[Path]:
    return [path for path in sorted(GALLERY.glob("*.md")) if path.stem != "index"]


def is_magic(row: str) -> bool:
    return row.startswith(("%", "!"))


def lines_of(source: str) -> list[str]:
    """The lines of a program that count."""
    return [row for row in source.splitlines() if row.strip() and not is_magic(row)]


# -- Text ---------------------------------------------------------------------------------------------------------


@lru_cache
def titles() -> dict[str, str]:
    """The title of each section of the book that has a label."""
    found: dict[str, str] = {}
    for path in (ROOT / "book").rglob("*.md"):
        for label, title in re.findall(r"^\(([\w-]+)\)=\n+#+ (.*)$", path.read_text(encoding="utf-8"), re.M):
            found[label] = title
    return found


def role(match: re.Match[str]) -> str:
    """What a role of Sphinx says, in plain words."""
    name, text = match.groups()
    shown = re.fullmatch(r"(.*?)\s*<.*>", text, re.S)
    if name == "ref":
        return f"*{shown[1] if shown else titles()[text]}*"
    if name == "numref":
        return "the picture below"
    if name in ("cite", "cite:p", "cite:t"):
        works = [re.fullmatch(r"(\D+)(\d{4}\w?)", key.strip()) for key in text.split(",")]
        return "[" + ", ".join(f"{work[1]} {work[2]}" for work in works if work) + "]"
    if name in ("term", "index"):
        return (shown[1] if shown else text).removeprefix("!")
    raise ValueError(f"a notebook has no words for the role {{{name}}}`{text}`")


def plain(text: str) -> str:
    """Markdown without what only Sphinx understands."""
    text = re.sub(r"^\([\w-]+\)=\n", "", text, flags=re.M)
    text = re.sub(r"^```\{index\}[^\n]*\n```\n", "", text, flags=re.M)
    text = re.sub(r"^\{download\}`[^`]*`\n", "", text, flags=re.M)
    text = re.sub(r"^:::\{margin\}\n(.*?)^:::\n", r"\1", text, flags=re.M | re.S)
    text = re.sub(r"\{([\w:]+)\}`([^`]*)`", role, text)
    left = re.search(r"^(`{3,}|:{3,})\{.*$", text, flags=re.M)
    if left:
        raise ValueError(f"a notebook cannot show the directive {left[0]}")
    return re.sub(r"\n{3,}", "\n\n", text).strip()


# -- Notebooks ----------------------------------------------------------------------------------------------------


def code_cells(source: str, name: str) -> list[str]:
    """A cell of a page as cells of a notebook, without the magics of this repository."""
    first, _, rest = source.partition("\n")
    if first.startswith("%load_ext tools."):
        return []
    if first.startswith("%%mpirun"):  # a program of its own: it is written to a file, and run by the launcher
        arguments = first.removeprefix("%%mpirun").replace("--root", "").strip()
        return [
            f"%%writefile {name}.py\n{rest}",
            f"import sys\n!mpirun {arguments} {{sys.executable}} {name}.py",
        ]
    return [source]


def notebook(path: Path):
    """A page as a notebook, which has not been run."""
    import nbformat
    from myst_nb.core.read import read_myst_markdown_notebook

    page, new = read_myst_markdown_notebook(path.read_text(encoding="utf-8"), path=path), nbformat.v4
    cells, programs = [], 0
    for cell in page.cells:
        if cell.cell_type == "markdown":
            cells.append(new.new_markdown_cell(plain(cell.source)))
            continue
        programs += cell.source.startswith("%%mpirun")
        for source in code_cells(cell.source, f"{path.stem}_{programs}"):
            cells.append(new.new_code_cell(source))
            if "hide-input" in cell.metadata.get("tags", []):
                cells[-1].metadata["jupyter"] = {"source_hidden": True}
    title, _, text = cells[0].source.partition("\n")
    cells[0].source = f"{title}\n\n{NOTE}\n{text}"
    for number, cell in enumerate(cells):
        cell.id = f"{path.stem}-{number}"  # the same in each build
    made = new.new_notebook(cells=cells)
    made.metadata["kernelspec"] = dict(name="python3", display_name="Python 3", language="python")
    nbformat.validate(made)
    return made


def write_notebooks(folder: Path) -> list[Path]:
    import nbformat

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for path in pages():
        written.append(folder / f"{path.stem}.ipynb")
        text = nbformat.writes(notebook(path)) + "\n"
        if not written[-1].exists() or written[-1].read_text(encoding="utf-8") != text:
            written[-1].write_text(text, encoding="utf-8")
    return written


# -- Thumbnails ---------------------------------------------------------------------------------------------------


def draw_thumbnail(path: Path, folder: Path) -> Path:
    """Run the cells of a page on one rank up to its first picture with the tag `thumbnail`, and save that."""
    import os

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from myst_nb.core.read import read_myst_markdown_notebook

    here, space = os.getcwd(), {"__name__": "__main__"}
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        try:
            for cell in read_myst_markdown_notebook(path.read_text(encoding="utf-8"), path=path).cells:
                if cell.cell_type == "code" and not cell.source.startswith("%%"):
                    rows = ["" if is_magic(row) else row for row in cell.source.split("\n")]
                    exec(compile("\n".join(rows), str(path), "exec"), space)
                    if "thumbnail" in cell.metadata.get("tags", []):
                        break
        finally:
            os.chdir(here)
    picture = folder / f"{path.stem}.png"
    plt.gcf().savefig(picture, dpi=60, transparent=True, metadata={"Software": None})
    plt.close("all")
    return picture


def setup(app) -> dict[str, bool]:
    app.connect("builder-inited", lambda app: write_notebooks(NOTEBOOKS))
    return dict(parallel_read_safe=True, parallel_write_safe=True)


def main(arguments: list[str]) -> int:
    sys.path.insert(0, str(ROOT))
    if len(arguments) == 2 and arguments[0] == "notebooks":
        written = write_notebooks(Path(arguments[1]))
    elif arguments == ["thumbnails"]:
        folder = GALLERY / "thumbnails"
        folder.mkdir(exist_ok=True)
        written = [draw_thumbnail(path, folder) for path in pages()]
    else:
        print(__doc__)
        return 2
    print(*written, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
