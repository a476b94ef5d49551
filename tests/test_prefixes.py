"""Every prefix of the book is a program: the package as of chapter NN imports, and the examples of that chapter run on it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.tangle import Book

pytestmark = pytest.mark.serial  # the tangler knows nothing of ranks

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = [path for path in sorted((ROOT / "book/chapters").glob("*.md")) if "01" <= path.name < "90"]
BESIDE = "book", "tests", "tools", "benchmarks", "conftest.py", "pyproject.toml", "conf.py", "README.md"

# Runs a job (a folder and arguments of pytest) in each of several processes, as many at a time as there are cores. They
# are forks of one that has imported what takes long. In each, all modules in the folder are imported, and pytest runs;
# nothing of the installed package is in reach.
RUN = """
import importlib, json, os, pathlib, sys
import matplotlib.pyplot, numba, numpy, pytest, scipy.optimize, scipy.special

sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]


def work(folder, arguments):
    os.chdir(folder)
    output = os.open("output", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.path[:0] = [".", "providers/pfft-python"]
    for path in sorted(pathlib.Path("vmad_lit").rglob("*.py")):
        if path.name != "mypy_plugin.py":
            module = importlib.import_module(".".join(path.with_suffix("").parts).removesuffix(".__init__"))
            assert pathlib.Path(module.__file__).resolve() == path.resolve(), module.__file__
    return pytest.main(arguments)


jobs, running, codes = json.loads(sys.argv[1]), {}, {}
while jobs or running:
    while jobs and len(running) < os.cpu_count():
        folder, arguments = jobs.pop(0)
        child = os.fork()
        if child == 0:
            code = 70
            try:
                code = work(folder, arguments)
            except BaseException:
                import traceback
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        running[child] = folder
    child, status = os.wait()
    codes[running.pop(child)] = os.waitstatus_to_exitcode(status)
print(json.dumps(codes))
"""


def job(folder, upto, chapter, *options):
    """What runs a chapter on the package as of another one, in a folder."""
    Book.load(ROOT, upto=upto).export(folder)
    for name in BESIDE:
        (folder / name).symlink_to(ROOT / name)
    pages = f"book/chapters/{chapter.name}"
    return str(folder), ["-q", "-p", "no:cacheprovider", "--tb=short", *options, pages]


def run(jobs):
    """Exit status and output of each job, by its folder."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= dict(OMP_NUM_THREADS="1", MPLBACKEND="Agg")
    command = [sys.executable, "-c", RUN, json.dumps(jobs)]
    ended = subprocess.run(command, env=environment, text=True, stdout=subprocess.PIPE, check=True)
    codes = json.loads(ended.stdout)
    return {folder: (codes[folder], Path(folder, "output").read_text()) for folder, _ in jobs}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, request):
    """How each of the chosen chapters fares on what is written by then; with `--soak` its cells run as well."""
    chosen = {
        item.callspec.params["chapter"]
        for item in request.session.items
        if hasattr(item, "callspec") and "chapter" in item.callspec.params and item.path == request.path
    }
    options = [] if request.config.getoption("--soak") else ["-k", "examples"]
    folders = {chapter: tmp_path_factory.mktemp(chapter.stem) for chapter in sorted(chosen)}
    jobs = [job(folder, int(chapter.name[:2]), chapter, *options) for chapter, folder in folders.items()]
    results = run(jobs)
    return {chapter: results[str(folder)] for chapter, folder in folders.items()}


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_runs_on_what_is_written_by_then(chapter, outcomes):
    code, output = outcomes[chapter]
    nothing = code == pytest.ExitCode.NO_TESTS_COLLECTED and ">>> " not in chapter.read_text(encoding="utf-8")
    assert code == 0 or nothing, output


def test_what_a_chapter_lacks_is_noticed(tmp_path):
    """A chapter on the package as of the one before."""
    [this] = [path for path in CHAPTERS if path.name.endswith("-arithmetic.md")]
    [(code, output)] = run([job(tmp_path, int(this.name[:2]) - 1, this, "-k", "examples")]).values()
    assert code != 0 and f"book/chapters/{this.name}" in output
