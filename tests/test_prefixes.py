"""Every prefix of the book is a program: the package as of chapter NN imports, and the examples of that chapter run on it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.tangle import Book

pytestmark = pytest.mark.serial  # the tangler knows nothing of ranks

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = [path for path in sorted((ROOT / "book/chapters").glob("*.md")) if "01" <= path.name < "90"]

# Imports all modules, and runs pytest; nothing of the installed package is in reach.
RUN = """
import importlib, pathlib, sys

sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
sys.path[:0] = [".", "providers/pfft-python"]
for path in sorted(pathlib.Path("vmad_lit").rglob("*.py")):
    module = importlib.import_module(".".join(path.with_suffix("").parts).removesuffix(".__init__"))
    assert pathlib.Path(module.__file__).resolve() == path.resolve(), module.__file__
import pytest

sys.exit(pytest.main(sys.argv[1:]))
"""


def run_on(folder, chapter, *options):
    """Run the examples of a chapter on the package in a folder."""
    for name in (
        "book",
        "tests",
        "tools",
        "benchmarks",
        "conftest.py",
        "pyproject.toml",
        "conf.py",
        "README.md",
    ):
        (folder / name).symlink_to(ROOT / name)
    command = [sys.executable, "-c", RUN, "-q", "-p", "no:cacheprovider", "--tb=short", *options]
    command.append(f"book/chapters/{chapter.name}")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_runs_on_what_is_written_by_then(chapter, tmp_path, request):
    """Up to the arrays and ranks, always; later the package grows by whole modules only: it is imported, and with
    `--soak` run as well, with the cells."""
    later = chapter.name > "22"
    options = (
        [] if request.config.getoption("--soak") else ["--collect-only"] if later else ["-k", "examples"]
    )
    Book.load(ROOT, upto=int(chapter.name[:2])).export(tmp_path)
    ended = run_on(tmp_path, chapter, *options)
    assert ended.returncode == 0, ended.stdout


def test_what_a_chapter_lacks_is_noticed(tmp_path):
    """A chapter on the package as of the one before."""
    [this] = [path for path in CHAPTERS if path.name.startswith("08")]
    Book.load(ROOT, upto=7).export(tmp_path)
    ended = run_on(tmp_path, this, "-k", "examples")
    assert ended.returncode != 0 and "book/chapters/08-arithmetic.md" in ended.stdout
