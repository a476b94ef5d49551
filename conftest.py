"""How pytest reads this project: the chapters of the book are tests, and every test may run on several ranks.

*Chapters.*  Each page of the book is collected as two items: ``examples``, all its ``pycon`` fences in one name space, and
``cells``, its executed cells in another.  A failure names ``chapter.md:line``.  A package that is older than its
chapters is told before anything else.

*Communicators.*  A test that uses a communicator is marked ``collective``: such tests, and no others, run under mpirun.
The mark is checked.  ``MPI.COMM_WORLD`` is replaced by one that counts what is asked of it; a test that asks and is not
marked fails, and so does one that is marked and does not ask.  ``serial`` is for tests that ask and must stay on one rank.
In a chapter the mark is a line of the front matter, ``tests: collective``, for one of the two items ``tests: collective
cells``.

*Ranks.*  ``mpirun -n 3 pytest`` runs the same tests on all ranks, in step.  After every phase of a test the ranks tell
rank 0 how it went: a failure on any of them is a failure on all, reported once, by rank 0.  A rank that does not answer
within ``mpi_grace`` seconds waits for something that will not come (one rank failed inside a collective call, say);
then the job is ended, and the reports that exist are printed.  Without mpi4py, or without mpirun, none of this happens.

*Examples of hypothesis.*  On one rank they are new in each run; on several they are fewer, the same on all ranks, and
others than on another number of ranks; in a soak (``--soak``) they are many.  ``examples(n)`` of ``tests/helpers.py``
follows.
"""

from __future__ import annotations

import gc
import os
import re
import sys
import tempfile
import time
import traceback
from functools import lru_cache, wraps
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent

# Set by the launchers of MPICH, Open MPI and Slurm: only then is this process one of several.
LAUNCHED = any(
    name in os.environ for name in ("PMI_SIZE", "PMIX_RANK", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
)


pytest.register_assert_rewrite("helpers")


def pytest_addoption(parser):
    parser.addini("mpi_grace", "seconds to wait for the other ranks after a test", default="60")
    parser.addoption(
        "--soak",
        action="store_true",
        help="ten times as many random examples and the tests marked `soak`, and no others",
    )

    parser.addoption(
        "--no-cells",
        action="store_true",
        help="leave out the cells of the book's pages, for when the book is built as well, which runs them",
    )


def pytest_configure(config):
    os.environ["MPLBACKEND"] = "Agg"
    os.environ.setdefault("VMAD_LIT_CHECK", "1")  # ranks look after each other
    config.addinivalue_line(
        "markers", "collective: uses a communicator; run under mpirun too, as no other test is"
    )
    config.addinivalue_line("markers", "serial: uses a communicator, of one rank only; left out under mpirun")
    config.addinivalue_line("markers", "soak: takes long, and is run by `make soak` only")
    watch_communicators()
    ranks = Ranks.join(float(config.getini("mpi_grace")))
    try:
        from hypothesis import settings
    except ImportError:
        pass
    else:  # no failures for being slow on a busy machine
        settings.register_profile("project", deadline=None)
        settings.register_profile("ranks", deadline=None, max_examples=25, derandomize=True, database=None)
        settings.register_profile("soak", deadline=None, max_examples=1000)
        settings.load_profile("ranks" if ranks else "soak" if config.getoption("--soak") else "project")
    if ranks is not None:
        config.pluginmanager.register(ranks, "ranks")


def pytest_collection_modifyitems(config, items):
    ranks, soak = config.pluginmanager.get_plugin("ranks"), config.getoption("--soak")

    def belongs(item):
        long = item.get_closest_marker("soak") is not None
        return (is_collective(item) if ranks else True) and (long or is_random(item) if soak else not long)

    config.hook.pytest_deselected(items=[item for item in items if not belongs(item)])
    items[:] = [item for item in items if belongs(item)]
    for item in items:
        if ranks and is_random(item):
            from hypothesis import seed

            seed(f"{item.function.__qualname__} on {ranks.size} ranks")(item.function)


def is_random(item):
    """Whether hypothesis draws the examples of a test."""
    return getattr(getattr(item, "function", None), "is_hypothesis_test", False)


def is_collective(item):
    return item.get_closest_marker("collective") is not None and item.get_closest_marker("serial") is None


class Heap:
    """What imports have left in memory is set aside, or each ``gc.collect()`` of a test would walk through it again."""

    modules = 0

    @classmethod
    def set_aside(cls):
        if len(sys.modules) > cls.modules + 50:
            cls.modules = len(sys.modules)
            gc.collect()
            gc.freeze()


@pytest.fixture
def folder(tmp_path, request):
    """The path of an empty folder, the same on all ranks."""
    ranks = request.config.pluginmanager.get_plugin("ranks")
    return ranks.comm.bcast(str(tmp_path)) if ranks else str(tmp_path)


# -- Chapters that are newer than the package -----------------------------------------------------------------------


@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and not hasattr(session.config, "workerinput") and (ROOT / "book").is_dir():
        wrong = drift(session.config)
        if wrong:
            reporter.write_line(
                f"THE PACKAGE IS OLDER THAN ITS CHAPTERS: {', '.join(wrong[:3])}"
                + (f" and {len(wrong) - 3} more" if wrong[3:] else "")
                + "\nrun `python tools/tangle.py`, or these tests tell nothing of the chapters",
                red=True,
            )


def drift(config) -> list[str]:
    """What differs between book and package; remembered, so that chapters are read again only if a file has changed."""
    cache = getattr(config, "cache", None)
    known = cache.get("vmad_lit/older", None) if cache else None
    if known and known["stamp"] == stamp(known["files"], known["folders"]):
        return known["wrong"]
    from tools.tangle import TangleError

    book = the_book(ROOT)
    try:
        wrong = [found.path for found in book.check()]
    except TangleError as error:
        wrong = [str(error.problems[0])]
    if cache:
        files, folders = list(book.roots), book.packages
        cache.set(
            "vmad_lit/older", dict(wrong=wrong, files=files, folders=folders, stamp=stamp(files, folders))
        )
    return wrong


def stamp(files, folders) -> list:
    """Names, times and sizes of the chapters, of these files, and of what else is in these folders."""
    paths = {ROOT / name for name in files} | {
        path for name in folders for path in (ROOT / name).rglob("*.py")
    }
    known = sorted(path for path in paths | set((ROOT / "book").rglob("*.md")) if path.exists())
    return [[str(path), path.stat().st_mtime_ns, path.stat().st_size] for path in known]


# -- Communicators ----------------------------------------------------------------------------------------------


class Watch:
    """How often a communicator of all ranks has been asked for something, in this process."""

    asked = 0


def watch_communicators():
    """Replace ``MPI.COMM_WORLD`` by one that counts what is asked of it and of those that are split off from it."""
    try:
        from mpi4py import MPI
    except ImportError:
        return

    def watched(base):
        class Communicator(base):
            def __getattribute__(self, name):
                Watch.asked += 1
                return super().__getattribute__(name)

            def __reduce__(self):
                return "COMM_WORLD" if self is MPI.COMM_WORLD else super().__reduce__()

        for name in ("Split", "Split_type", "Create", "Create_group", "Create_cart", "Sub"):
            if hasattr(base, name):
                setattr(Communicator, name, splitting(getattr(base, name)))
        Communicator.__name__, Communicator.__qualname__ = base.__name__, base.__qualname__
        Communicator.__module__ = MPI.__name__  # by this name COMM_WORLD is pickled
        return Communicator

    def splitting(method):
        @wraps(method)
        def split(self, *args, **kwargs):
            made = method(self, *args, **kwargs)
            return kinds[type(made)](made) if type(made) in kinds else made

        return split

    kinds = {base: watched(base) for base in (MPI.Intracomm, MPI.Cartcomm)}
    if type(MPI.COMM_WORLD) in kinds:
        MPI.COMM_WORLD = kinds[MPI.Intracomm](MPI.COMM_WORLD)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item):
    Heap.set_aside()
    item.asked_before = Watch.asked
    return (yield)


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_call(item):
    """A test that has passed must be marked for what it is."""
    result = yield
    uses = Watch.asked > item.asked_before
    if uses and not (is_collective(item) or item.get_closest_marker("serial")):
        pytest.fail(
            "this test uses a communicator: mark it `collective`, or `serial` if it must stay on one rank",
            pytrace=False,
        )
    if is_collective(item) and not uses:
        pytest.fail("this test is marked `collective` and uses no communicator", pytrace=False)
    return result


# -- Chapters -----------------------------------------------------------------------------------------------


def pytest_collect_file(file_path, parent):
    if file_path.suffix == ".md" and parent.config.rootpath / "book" in file_path.parents:
        return Chapter.from_parent(parent, path=file_path)
    if file_path == parent.config.rootpath / "README.md":
        return Page.from_parent(parent, path=file_path)
    return None


class Page(pytest.Module):
    """A page in Markdown outside of the book: its examples, in ``pycon`` fences."""

    obj = None  # there is no module to import

    def collect(self):
        from markdown_it import MarkdownIt

        text = self.path.read_text(encoding="utf-8-sig")
        fences = [
            token for token in MarkdownIt().parse(text) if token.type == "fence" and token.info == "pycon"
        ]
        yield from self.examples(blank(text, [range(token.map[0] + 2, token.map[1]) for token in fences]))

    def examples(self, text):
        """The examples in a text as one test, if there are any."""
        import doctest

        from _pytest.doctest import DoctestItem, _get_runner
        from pytest_doctestplus.plugin import OutputChecker, get_optionflags

        test = doctest.DocTestParser().get_doctest(
            text, {"__name__": "__main__"}, "examples", str(self.path), 0
        )
        if test.examples:  # the runner stops at the first failure, so that all ranks stop at the same place
            runner = _get_runner(
                checker=OutputChecker(),
                verbose=False,
                continue_on_failure=False,
                optionflags=get_optionflags(self) | doctest.REPORT_UDIFF,
            )
            yield DoctestItem.from_parent(self, name="examples", runner=runner, dtest=test)


# In the front matter of a chapter: the mark of both its items, or of one of them.
MARK = r"---\n(?:(?!---).*\n)*?tests: *(\w+)(?: +(examples|cells))? *\n"


class Chapter(Page):
    """A chapter of the book: its examples and its cells."""

    def collect(self):
        name = self.path.relative_to(self.config.rootpath).as_posix()
        blocks = [block for block in the_book(self.config.rootpath).blocks if block.chapter == name]
        text = self.path.read_text(encoding="utf-8-sig")
        examples = [range(block.body_line, block.end_line) for block in blocks if block.language == "pycon"]
        items = list(self.examples(blank(text, examples)))
        cells = [Cell(block) for block in blocks if block.directive == "code-cell"]
        if cells and not self.config.getoption("--no-cells"):
            items.append(Cells.from_parent(self, name="cells"))
            items[-1].cells = cells
        mark, only = re.match(MARK, text).groups() if re.match(MARK, text) else (None, None)
        for item in items:
            if mark and only in (None, item.name):
                item.add_marker(getattr(pytest.mark, mark))
        yield from items


@lru_cache
def the_book(root: Path):
    from tools.tangle import Book

    return Book.load(root)


def blank(text: str, keep) -> str:
    """The text with all lines blanked but those whose numbers are in the ranges `keep`, so that line numbers stay."""
    keep = {number for numbers in keep for number in numbers}
    rows = text.split("\n")
    return "\n".join(row if number in keep else "" for number, row in enumerate(rows, start=1)) + "\n"


class Cell:
    """One executed cell: its code, its tags, and the line where it begins."""

    def __init__(self, block):
        self.line = block.code_line
        self.tags = set(re.findall(r"[\w-]+", block.options.partition("tags:")[2]))
        rows = block.code.splitlines()
        while rows and not rows[0].strip():
            rows, self.line = rows[1:], self.line + 1
        self.ranks = None
        if rows and rows[0].startswith("%%mpirun"):
            self.ranks = rows[0].split()[1:]
            rows[0] = ""
        # Line magics and shell lines are for the page alone.
        self.source = "\n".join("" if row.startswith(("%", "!")) else row for row in rows) + "\n"

    def run(self, namespace: dict, path: Path):
        if "skip-execution" in self.tags or (self.ranks is not None and LAUNCHED):
            return
        if self.ranks is not None:
            from tools.cells import Place
            from tools.mpirun import mpirun

            leading = len(self.source) - len(self.source.lstrip("\n"))
            place = Place(path.name, self.line + leading)
            done = mpirun(self.source, self.ranks, check=False, place=place)
            if done.returncode:
                raise CellFailed(
                    f"{path}:{self.line}: under mpirun {' '.join(self.ranks)}\n{done.stdout}{done.stderr}"
                )
            return
        code = compile("\n" * (self.line - 1) + self.source, str(path), "exec")
        if "raises-exception" in self.tags:
            with pytest.raises(BaseException):  # noqa: B017, PT011  (the page shows which)
                exec(code, namespace)
        else:
            exec(code, namespace)


class CellFailed(Exception):
    """A cell that ran elsewhere failed there; the message is its report."""


class Cells(pytest.Item):
    """The executed cells of a chapter, as one test."""

    cells: list[Cell]

    def runtest(self):
        if any("matplotlib" in cell.source for cell in self.cells):
            pytest.importorskip("matplotlib")
        namespace = {"__name__": "__main__", "__file__": str(self.path)}
        here = os.getcwd()
        with tempfile.TemporaryDirectory() as scratch:  # as in the build: what a cell writes does not stay
            os.chdir(scratch)
            try:
                for cell in self.cells:
                    if not (LAUNCHED and "serial" in cell.tags):
                        cell.run(namespace, self.path)
            finally:
                os.chdir(here)
                if "matplotlib.pyplot" in sys.modules:
                    sys.modules["matplotlib.pyplot"].close("all")

    def repr_failure(self, excinfo):
        if isinstance(excinfo.value, CellFailed):
            return str(excinfo.value)
        frames = traceback.extract_tb(excinfo.value.__traceback__)
        first = next((i for i, frame in enumerate(frames) if frame.filename == str(self.path)), 0)
        if isinstance(excinfo.value, SyntaxError):
            first = len(frames)
        rows = traceback.format_list(frames[first:]) + traceback.format_exception_only(excinfo.value)
        line = frames[first].lineno if first < len(frames) else getattr(excinfo.value, "lineno", 0)
        name = os.path.relpath(self.path, self.config.rootpath)
        return "".join(rows) + f"\n{name}:{line}: {type(excinfo.value).__name__}"

    def reportinfo(self):
        return self.path, self.cells[0].line - 1, f"{self.path.name}: cells"


# -- Where in the book ----------------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Add to a failure the lines of the chapters that its traceback passes through."""
    report = yield
    if report.failed and call.excinfo is not None:
        seen = chapter_lines(call.excinfo.value)
        if seen:
            report.sections.append(("in the book", "\n".join(seen)))
    return report


def chapter_lines(error: BaseException) -> list[str]:
    rows = []
    for frame in traceback.extract_tb(error.__traceback__):
        try:
            place = the_book(ROOT).where(frame.filename, frame.lineno)
        except (
            Exception
        ):  # not a file of the book, or the book is broken: a report must not fail for want of a comment
            continue
        rows.append(f"{place[0]}:{place[1]}: {frame.line}")
    return rows


# -- Ranks ------------------------------------------------------------------------------------------------------

SEVERITY = {"passed": 0, "skipped": 1, "failed": 2}
REPORT, VERDICT = 71, 72


class Ranks:
    """Keeps the ranks in step, test by test."""

    def __init__(self, world, grace: float):
        from mpi4py import MPI

        self.MPI = MPI
        self.comm = world.Dup()
        self.rank, self.size, self.grace = world.rank, world.size, grace
        self.config = None
        self.last: dict | None = None  # what this rank told last
        self.answers: dict[int, dict] = {}  # what the others told, while rank 0 gathers
        self.failures: list[str] = []  # reports that would be lost if the job had to be ended

    @classmethod
    def join(cls, grace: float) -> Ranks | None:
        if not LAUNCHED:
            return None
        try:
            from mpi4py import MPI
        except ImportError:
            return None
        return cls(MPI.COMM_WORLD, grace) if MPI.COMM_WORLD.size > 1 else None

    # .. exchange ..

    def wait(self, ready, missing=lambda: "rank 0", patience=1.0):
        """Poll until ``ready()``; after the grace period end the job, telling who is ``missing()``."""
        start, pause = time.monotonic(), 0.0
        while not ready():
            if time.monotonic() - start > patience * self.grace:
                self.abort(f"no answer from {missing()} for {patience * self.grace:g} s")
            time.sleep(pause)
            pause = min(pause + 1e-5, 2e-3)

    def gather(self, mine):
        """Everybody's ``mine`` on rank 0 (None elsewhere); ends the job if a rank does not come."""
        if self.rank:
            request = self.comm.isend(mine, dest=0, tag=REPORT)
            self.wait(lambda: request.test()[0])
            return None
        answers = {0: mine}

        def ready():
            while self.comm.iprobe(source=self.MPI.ANY_SOURCE, tag=REPORT):
                status = self.MPI.Status()
                value = self.comm.recv(source=self.MPI.ANY_SOURCE, tag=REPORT, status=status)
                answers[status.Get_source()] = value
            return len(answers) == self.size

        def missing():
            return "rank " + ", ".join(str(r) for r in range(self.size) if r not in answers)

        try:
            self.answers = answers
            self.wait(ready, missing)
        finally:
            self.answers = {}
        return [answers[r] for r in range(self.size)]

    def share(self, verdict):
        """Rank 0's ``verdict`` on all ranks."""
        if self.rank == 0:
            for request in [self.comm.isend(verdict, dest=r, tag=VERDICT) for r in range(1, self.size)]:
                self.wait(lambda request=request: request.test()[0], lambda: "another rank")
            return verdict
        # Rank 0 may itself be waiting for somebody, and knows for whom: who has nothing to tell lets it speak first.
        failed = self.last is not None and self.last["outcome"] == "failed"
        self.wait(lambda: self.comm.iprobe(source=0, tag=VERDICT), patience=1.0 if failed else 2.0)
        return self.comm.recv(source=0, tag=VERDICT)

    def abort(self, why: str):
        """End the job on all ranks, after printing what is known."""
        capture = self.config.pluginmanager.getplugin("capturemanager") if self.config else None
        if capture:
            capture.suspend_global_capture(in_=True)
        out = [f"\n== rank {self.rank}: {why}; the job is ended =="]
        for rank, told in sorted({**self.answers, self.rank: self.last}.items()):
            if isinstance(told, dict) and told["outcome"] == "failed":
                out.append(f"-- rank {rank}: {told['name']} failed --\n{told['text']}")
        os.write(2, "\n".join([*out, *self.failures, ""]).encode())
        self.comm.Abort(1)

    # .. hooks ..

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self, session):
        self.config = session.config
        reporter = self.config.pluginmanager.getplugin("terminalreporter")
        if self.rank and reporter is not None:
            reporter._tw._file = open(os.devnull, "w")  # rank 0 speaks for all

    def pytest_report_header(self):
        return f"ranks: {self.size}"

    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self, session):
        names = [item.nodeid for item in session.items]
        everybody = self.gather(names)
        verdict = None
        if everybody is not None:
            odd = [r for r, theirs in enumerate(everybody) if theirs != names]
            if odd:
                differ = sorted(set(names) ^ set(everybody[odd[0]]))[:5]
                verdict = f"rank {odd[0]} collected other tests than rank 0: {', '.join(differ) or 'in another order'}"
        verdict = self.share(verdict)
        if verdict:
            raise pytest.UsageError(verdict)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        mine = {
            "outcome": report.outcome,
            "name": f"{item.nodeid} ({report.when})",
            "text": report.longreprtext if report.failed else "",
            "reason": report.longrepr if report.skipped and isinstance(report.longrepr, tuple) else None,
            "wasxfail": getattr(report, "wasxfail", None),
        }
        self.last = mine
        everybody = self.gather(mine)
        verdict = self.share(merge(everybody) if everybody is not None else None)
        if verdict is None:
            return report
        if report.failed:
            if verdict["text"]:
                report.sections.append(("other ranks", verdict["text"]))
            self.failures.append(f"-- {mine['name']} had failed before --\n{mine['text']}\n{verdict['text']}")
        elif report.outcome != verdict["outcome"]:
            report.outcome = verdict["outcome"]
            report.longrepr = (
                verdict["text"] if report.failed else verdict["reason"] or (str(item.path), 0, "skipped")
            )
            if verdict["wasxfail"] is not None:
                report.wasxfail = verdict["wasxfail"]
            elif hasattr(report, "wasxfail"):
                del report.wasxfail
        return report

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_sessionfinish(self, session, exitstatus):
        result = yield
        if self.rank and exitstatus in (0, 1):
            session.exitstatus = 0  # rank 0 speaks for all, also to the shell
        return result


def merge(everybody: list[dict]) -> dict | None:
    """What the ranks' outcomes make together: the worst; None when all agree and none has failed."""
    worst = max(everybody, key=lambda answer: SEVERITY[answer["outcome"]])
    if worst["outcome"] != "failed" and all(answer["outcome"] == worst["outcome"] for answer in everybody):
        return None
    others = [
        f"-- rank {rank} --\n{answer['text']}"
        for rank, answer in enumerate(everybody)
        if rank and answer["text"] not in ("", everybody[0]["text"])
    ]
    return worst | {"text": "\n".join(others)}
