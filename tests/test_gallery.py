"""The gallery: short programs, each a page and a notebook; that the pages' cells run is tested with the chapters'."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools import gallery

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("myst_nb")
pytestmark = pytest.mark.serial

PAGES = gallery.pages()
every_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)


def programs(path):
    """The code of a page, cell by cell, without its magics."""
    cells = re.findall(r"^```\{code-cell\}[^\n]*\n(.*?)^```", path.read_text(), re.M | re.S)
    return [re.sub(r"\A---\n.*?\n---\n", "", cell, flags=re.S) for cell in cells]


@every_page
def test_a_page_is_short_and_whole(path):
    text = path.read_text()
    assert sum(len(gallery.lines_of(cell)) for cell in programs(path)) <= gallery.LINES
    assert "## Is it right?" in text and "## For your own problem" in text
    assert f"</_build/notebooks/{path.stem}.ipynb>" in text
    assert "name: fig-gallery-" in text and (gallery.GALLERY / "thumbnails" / f"{path.stem}.png").exists()
    index = (gallery.GALLERY / "index.md").read_text()
    assert f":img-top: thumbnails/{path.stem}.png" in index and f"\n{path.stem}\n" in index


@every_page
def test_a_notebook_has_the_programs_of_its_page_and_no_directives(path):
    notebook = gallery.notebook(path)
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    text = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    kept = [row for cell in programs(path) for row in gallery.lines_of(cell)]
    assert [row for cell in code for row in gallery.lines_of(cell) if row != "import sys"] == kept
    assert not any("tools." in cell or "%%mpirun" in cell for cell in code)
    assert text[0].startswith("# ") and gallery.NOTE in text[0]
    assert not any(
        re.search(r"\{[\w:-]+\}|:::|^\([\w-]+\)=", re.sub(r"\$+.*?\$+", "", cell, flags=re.S), re.M)
        for cell in text
    )


def test_plain_words():
    text = "(a-label)=\n# A {term}`Taylor test`\n\n```{index} a, b\n```\n\nSee {ref}`gallery`, {ref}`here <gallery>`, {term}`them <rank>` {cite}`Hairer1993`.\n"
    assert gallery.plain(text) == "# A Taylor test\n\nSee *Complete programs*, *here*, them [Hairer 1993]."
    with pytest.raises(ValueError, match=r"no words for the role \{doc\}"):
        gallery.plain("{doc}`there`")
    with pytest.raises(ValueError, match="cannot show the directive ```{table}"):
        gallery.plain("```{table}\n```\n")


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="there is no mpirun")
def test_a_cell_on_many_ranks_runs_from_a_notebook(tmp_path):
    """It becomes a file and a command; the command is run as IPython would."""
    source = "%%mpirun -n 2 --root\nfrom mpi4py import MPI\ncomm = MPI.COMM_WORLD\nprint(*comm.gather(comm.size) or [])\n"
    write, run = gallery.code_cells(source, "ranks_1")
    first, _, program = write.partition("\n")
    assert first == "%%writefile ranks_1.py"
    (tmp_path / "ranks_1.py").write_text(program)
    command = run.removeprefix("import sys\n!").replace("{sys.executable}", sys.executable)
    from tools.mpirun import environment

    done = subprocess.run(
        command, shell=True, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=100
    )
    assert done.stdout.split() == ["2", "2"], done.stderr


@pytest.mark.soak
@every_page
def test_a_notebook_runs_where_nothing_of_the_repository_is(path, tmp_path):
    from nbclient import NotebookClient

    NotebookClient(
        gallery.notebook(path), timeout=200, resources=dict(metadata=dict(path=str(tmp_path)))
    ).execute()
