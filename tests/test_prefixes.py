"""Every prefix of the book is a program: the package as of chapter NN imports, and the examples of that chapter run on it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools.literate.book import chapter_number

pytestmark = pytest.mark.serial  # the tangler knows nothing of ranks

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = [path for path in sorted((ROOT / "book/chapters").glob("*.md")) if "001" <= path.name < "900"]
# Each part is one process, which begins with imports and reads the book; several, for several cores.
PARTS = [CHAPTERS[begin : begin + 28] for begin in range(0, len(CHAPTERS), 28)]
BESIDE = "book", "tests", "tools", "benchmarks", "conftest.py", "pyproject.toml", "conf.py", "README.md"

# Writes the package as of one chapter after the other into the current folder, where it grows, and runs pytest on it, each
# time in a fork of a process that has imported what takes long and has compiled each text of a module, once. In each, all
# modules in the folder are imported, and nothing of the installed package is in reach.
RUN = """
import functools, gc, importlib.machinery, importlib.metadata, json, os, pathlib, sys, traceback
import ducc0, hypothesis, markdown_it, matplotlib.pyplot, mdit_py_plugins, numba, numpy, pytest, scipy.optimize, scipy.special
from tools.tangle import Book

for plugin in importlib.metadata.entry_points(group="pytest11"):
    plugin.load()
sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
sys.path[:0] = [".", "providers/pfft-python"]
compiled = functools.cache(lambda data, path: compile(data, path, "exec", dont_inherit=True))
importlib.machinery.SourceFileLoader.source_to_code = lambda self, data, path: compiled(data, path)


def work(arguments):
    for path in sorted(pathlib.Path("vmad_lit").rglob("*.py")):
        if path.name != "mypy_plugin.py":
            module = importlib.import_module(".".join(path.with_suffix("").parts).removesuffix(".__init__"))
            assert pathlib.Path(module.__file__).resolve() == path.resolve(), module.__file__
    return pytest.main(arguments)


book = Book.load(os.environ["BOOK"])  # once for all: pytest finds the same chapters in the current folder
book.tangle()  # and asks whether the installed package is what they make
Book.load = classmethod(lambda cls, root: book)
for upto, arguments in json.loads(sys.argv[1]):
    for name, (text, _) in book.upto(upto).tangle().items():
        path = pathlib.Path(name)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            if path.suffix == ".py":
                compiled(text.encode(), str(path.absolute()))
    gc.collect()
    gc.freeze()  # or each child would walk through all this again
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            code = work(arguments)
        except BaseException:
            traceback.print_exc(file=sys.stdout)
        finally:
            sys.stdout.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(f"chapter {upto}: {code}", flush=True)
"""


def finished(path):
    """The number of the chapter that finishes what the examples of a chapter call: its own, or that of the one which its
    front matter names after `finished`."""
    named = re.match(r"---\n(?:(?!---).*\n)*?finished: *(\S+) *\n", path.read_text(encoding="utf-8"))
    [last] = [other for other in CHAPTERS if named and other.stem[4:] == named[1]] or [path]
    return chapter_number(last.name)


def run(folder, chapters, *options):
    """What pytest says of some chapters, each on the package as of a number that is given with it, and the ends, in order."""
    for name in BESIDE:
        (folder / name).symlink_to(ROOT / name)
    settings = ["-q", "-p", "no:cacheprovider", "-p", "no:warnings", "--tb=short", "--assert=plain", *options]
    jobs = [(upto, [*settings, f"book/chapters/{path.name}"]) for upto, path in chapters]
    environment = dict(
        os.environ, PYTHONPATH=str(ROOT), BOOK=str(ROOT), OMP_NUM_THREADS="1", MPLBACKEND="Agg"
    )
    # Python would take the bytecode of a file for that of another one which replaces it in the same second
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    command = [sys.executable, "-c", RUN, json.dumps(jobs)]
    ended = subprocess.run(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    codes = [line.split(": ")[1] for line in ended.stdout.splitlines() if line.startswith("chapter ")]
    assert ended.returncode == 0 and len(codes) == len(chapters), ended.stdout
    return ended.stdout, list(map(int, codes))


@pytest.mark.parametrize("part", PARTS, ids=lambda part: f"{part[0].name[:3]}-{part[-1].name[:3]}")
@pytest.mark.timeout(900)
def test_chapters_run_on_what_is_written_by_then(part, tmp_path, request):
    """The examples of each chapter of a part of the book; with `--soak` its cells run as well."""
    options = [] if request.config.getoption("--soak") else ["-k", "examples"]
    chapters = sorted((finished(path), path) for path in part)
    output, codes = run(tmp_path, chapters, *options)
    for (_, path), code in zip(chapters, codes):
        bare = ">>> " not in path.read_text(encoding="utf-8")
        assert code == 0 or bare and code == pytest.ExitCode.NO_TESTS_COLLECTED, output


def test_few_examples_call_what_later_chapters_finish():
    assert [path.stem[4:] for path in CHAPTERS if finished(path) != chapter_number(path.name)] == [
        "windows",
        "straight",
        "markov-chain",
        "draws",
        "warmup",
        "configuration",
    ]


def test_what_a_chapter_lacks_is_noticed(tmp_path):
    """A chapter on the package as of the one before."""
    [this] = [path for path in CHAPTERS if path.name.endswith("-arithmetic.md")]
    output, [code] = run(tmp_path, [(chapter_number(this.name) - 1, this)], "-k", "examples")
    assert code != 0 and f"book/chapters/{this.name}" in output
