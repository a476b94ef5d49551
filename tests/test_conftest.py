"""The rules of ``conftest.py``: what a chapter's failure looks like, and what happens when ranks part ways."""

import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from textwrap import dedent

import pytest

from helpers import needs_mpirun
from tools.mpirun import environment, launcher
from tools.tangle import Book

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.timeout(120)


def make_project(root):
    """A project of its own, with our conftest.py and a function ``run``."""
    shutil.copy(ROOT / "conftest.py", root)
    shutil.copytree(ROOT / "tools", root / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "pytest.ini").write_text(
        dedent("""\
        [pytest]
        testpaths = tests book
        addopts = -p no:cacheprovider --import-mode=importlib
        pythonpath = .
        doctest_optionflags = ELLIPSIS NORMALIZE_WHITESPACE FLOAT_CMP
        """)
    )
    (root / "tests").mkdir()
    (root / "book" / "chapters").mkdir(parents=True)
    return Project(root)


@pytest.fixture
def project(tmp_path):
    return make_project(tmp_path)


class Project:
    def __init__(self, root):
        self.root = root

    def test(self, text):
        (self.root / "tests" / "test_it.py").write_text(dedent(text))

    def chapter(self, text, name="01-it.md"):
        (self.root / "book" / "chapters" / name).write_text(dedent(text))

    def run(self, *arguments, ranks=None):
        command = [sys.executable, "-m", "pytest", *arguments]
        if ranks:
            command = [launcher(), "-n", str(ranks), *command]
        env = environment() | {"PYTHONPATH": str(self.root), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        env.pop("CI", None)  # there pytest says everything twice
        start = time.monotonic()
        done = subprocess.run(command, cwd=self.root, env=env, capture_output=True, text=True, timeout=100)
        done.seconds = time.monotonic() - start
        done.text = done.stdout + done.stderr
        return done


# -- chapters -----------------------------------------------------------------------------------------------


CHAPTER = """\
    ---
    file_format: mystnb
    ---
    # It

    ```python {#it file="it.py"}
    def double(x):
        '''
        >>> this is not an example of the chapter
        '''
        return x + x
    ```

    ```pycon
    >>> from it import double
    >>> double(1 / 3)
    0.6666667
    ```

    :::{admonition} Exercise
    What is next?

    ```pycon
    >>> double(2)
    4
    ```
    :::

    ```{code-cell} python
    :tags: [hide-input]

    import it
    x = it.double(3)
    ```

    ```{code-cell} python
    assert x == 6
    ```
    """


def with_module(project, text=CHAPTER):
    project.chapter(text)
    (project.root / "it.py").write_text("def double(x):\n    return x + x\n")


@pytest.fixture(scope="module")
def chapters(tmp_path_factory):
    """The report of one run of many chapters."""
    project = make_project(tmp_path_factory.mktemp("chapters"))
    with_module(project)
    # It is a chapter like the others, of which the first alone makes a file.
    text = CHAPTER.replace('```python {#it file="it.py"}', "```python")
    project.chapter(text.replace("    4\n", "    5\n"), "02-wrong-example.md")
    project.chapter(text.replace("x == 6", "x == 7"), "03-failing-cell.md")
    project.chapter(text.replace("x == 6", "x == = 6"), "04-no-python.md")
    project.chapter(
        """\
        # It

        ```{code-cell} python
        %matplotlib inline
        x = 1
        ```

        ```{code-cell} python
        :tags: [raises-exception]
        raise ValueError("as announced")
        ```

        ```{code-cell} python
        ---
        tags: [skip-execution]
        ---
        raise ValueError("not run")
        ```

        ```{code-cell} python
        assert x == 1
        ```
        """,
        "05-magics.md",
    )
    for wrong in False, True:
        project.chapter(
            f"""\
            # It

            ```{{code-cell}} python
            %%mpirun -n 2
            from mpi4py import MPI
            assert MPI.COMM_WORLD.allreduce(1) == {3 if wrong else 2}
            ```
            """,
            f"06-mpirun-{wrong}.md",
        )
    (project.root / "book" / "how-to").mkdir()
    (project.root / "book" / "how-to" / "page.md").write_text("# A page\n\n```pycon\n>>> 1 + 1\n2\n```\n")
    return project.run("-v")


def test_pages_of_other_folders_are_tested(chapters):
    assert "book/how-to/page.md::examples PASSED" in chapters.text


def test_examples_and_cells_of_a_chapter_are_run(chapters):
    assert "01-it.md::examples PASSED" in chapters.text and "01-it.md::cells PASSED" in chapters.text
    assert chapters.returncode == 1


def test_a_wrong_example_is_reported_with_the_line_of_the_chapter(chapters):
    assert "02-wrong-example.md:24: DocTestFailure" in chapters.text
    assert "02-wrong-example.md::examples FAILED" in chapters.text
    assert "02-wrong-example.md::cells PASSED" in chapters.text


def test_a_failing_cell_is_reported_with_the_line_of_the_chapter(chapters):
    assert "book/chapters/03-failing-cell.md:37: AssertionError" in chapters.text
    assert "assert x == 7" in chapters.text
    assert "03-failing-cell.md::examples PASSED" in chapters.text


def test_a_cell_that_is_not_python_is_reported_with_the_line_of_the_chapter(chapters):
    assert "04-no-python.md:37: SyntaxError" in chapters.text


def test_line_magics_are_for_the_page_alone_and_tags_are_kept(chapters):
    assert "05-magics.md::cells PASSED" in chapters.text


@needs_mpirun
@pytest.mark.parametrize("wrong", [False, True])
def test_mpirun_cells_run_on_their_own_ranks(chapters, wrong):
    assert f"06-mpirun-{wrong}.md::cells {'FAILED' if wrong else 'PASSED'}" in chapters.text
    assert ("06-mpirun-True.md:4: under mpirun -n 2" in chapters.text) and "AssertionError" in chapters.text


def test_without_mpi4py_everything_works_on_one_rank(project):
    with_module(project)
    (project.root / "mpi4py.py").write_text("raise ImportError('there is no mpi4py')\n")
    project.test("def test_it(): pass\n")
    done = project.run()
    assert done.returncode == 0, done.text
    assert "3 passed" in done.text


# -- the book and the package ---------------------------------------------------------------------------------


def test_a_package_that_is_older_than_its_chapters_is_told_first(project):
    with_module(project)
    run = partial(project.run, "-q", "-o", "addopts=", "-p", "cacheprovider", "tests")
    project.test("def test_it(): pass\n")
    assert "OLDER" in run().text.splitlines()[0]  # it.py was written by hand
    (project.root / "it.py").write_text(tangled(project))
    assert "OLDER" not in run().text
    chapter = project.root / "book" / "chapters" / "01-it.md"
    text = chapter.read_text()
    for wrong, named in ("return x + x", "it.py"), ("# <<No such chunk>>", "01-it.md:11"):
        chapter.write_text(text.replace("return x + x", wrong + "  # changed"))
        for _ in range(2):  # the second time from memory
            first = run().text.splitlines()[0]
            assert "OLDER" in first and named in first


def tangled(project):
    book = Book.load(project.root)
    return book.tangle()["it.py"].text


# -- communicators ----------------------------------------------------------------------------------------------


@needs_mpirun
def test_the_marks_are_checked(project):
    project.test("""\
        import copy, pickle
        import pytest
        from mpi4py import MPI
        from mpi4py.MPI import COMM_WORLD

        HALF = COMM_WORLD.Split(0)
        CART = MPI.COMM_WORLD.Create_cart([1]).Sub([True])

        def test_rank_unmarked(): COMM_WORLD.rank
        def test_split_unmarked(): HALF.allreduce(1)
        def test_cart_unmarked(): CART.Get_coords(0)
        @pytest.fixture
        def size(): return MPI.COMM_WORLD.size
        def test_fixture_unmarked(size): pass

        @pytest.mark.collective
        def test_nothing_marked(): MPI.COMM_SELF.Barrier()

        def test_nothing(): MPI.COMM_SELF.allreduce(1)
        @pytest.mark.serial
        def test_serial(): COMM_WORLD.Barrier()
        @pytest.mark.collective
        def test_collective(): HALF.Barrier()
        @pytest.mark.collective
        def test_skipped(): pytest.skip("asks nothing")
        def test_it_is_still_a_communicator():
            assert isinstance(COMM_WORLD, MPI.Intracomm) and COMM_WORLD == MPI.Intracomm(COMM_WORLD)
            assert pickle.loads(pickle.dumps(COMM_WORLD)) is MPI.COMM_WORLD

        @pytest.mark.collective
        class TestMany:
            def test_one(self): COMM_WORLD.rank
            @pytest.mark.serial
            def test_other(self): pass
        """)
    for number, mark in enumerate(["collective cells", "collective", "serial"]):
        project.chapter(
            f"""\
            ---
            file_format: mystnb
            tests: {mark}
            ---
            # It

            ```pycon
            >>> 1
            1
            ```

            ```{{code-cell}} python
            from mpi4py import MPI
            MPI.COMM_WORLD.rank
            ```
            """,
            f"0{number}-it.md",
        )
    done = project.run("-rfp")
    failed = {row.split("::")[-1].split()[0] for row in done.text.splitlines() if row.startswith("FAILED")}
    unmarked = {f"test_{name}_unmarked" for name in ("rank", "split", "cart", "fixture")}
    assert failed == {*unmarked, "test_it_is_still_a_communicator", "test_nothing_marked", "examples"}, (
        done.text
    )
    assert "FAILED book/chapters/01-it.md::examples" in done.text
    assert done.text.count("mark it `collective`") == 5 and done.text.count("and uses no communicator") == 2
    assert "7 failed, 10 passed, 1 skipped" in done.text


# -- ranks --------------------------------------------------------------------------------------------------


@needs_mpirun
def test_rank_0_alone_speaks_and_tests_of_one_rank_stay_away(project):
    with_module(project)
    project.chapter(
        """\
        ---
        tests: collective examples
        ---
        # It

        ```pycon
        >>> from mpi4py import MPI
        >>> MPI.COMM_WORLD.size
        3
        ```

        ```{code-cell} python
        assert False
        ```
        """,
        "02-it.md",
    )
    project.test("""\
        from mpi4py import MPI
        from hypothesis import given, settings, strategies as st
        import pytest

        @pytest.mark.collective
        def test_sum():
            print("noise")
            assert MPI.COMM_WORLD.allreduce(1) == MPI.COMM_WORLD.size

        seen = []

        @pytest.mark.collective
        @given(st.integers())
        def test_examples_are_few_and_those_of_all_ranks(n):
            seen.append(n)
            assert MPI.COMM_WORLD.allreduce(n) == 3 * n

        @pytest.mark.collective
        def test_how_many():
            assert MPI.COMM_WORLD.bcast(len(seen)) == settings().max_examples == 25

        def test_unmarked():
            assert False

        @pytest.mark.serial
        def test_one_rank_only():
            assert False
        """)
    done = project.run(ranks=3)
    assert done.returncode == 0, done.text
    assert done.text.count("4 passed, 5 deselected") == 1
    assert "ranks: 3" in done.text


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """The report of one run in which each rank fails once."""
    project = make_project(tmp_path_factory.mktemp("failures"))
    project.test("""\
        from mpi4py import MPI
        import pytest

        pytestmark = pytest.mark.collective

        @pytest.mark.parametrize("culprit", [0, 1, 2])
        def test_one_rank_fails(culprit):
            if MPI.COMM_WORLD.rank == culprit:
                raise ValueError(f"rank {culprit} has its day")

        def test_afterwards():
            assert MPI.COMM_WORLD.allreduce(1) == 3
        """)
    return project.run("-v", ranks=3)


@needs_mpirun
@pytest.mark.parametrize("culprit", [0, 1, 2])
def test_a_failure_on_one_rank_is_a_failure_and_the_rest_goes_on(failures, culprit):
    assert failures.returncode == 1, failures.text
    assert failures.text.count("3 failed, 1 passed") == 1
    assert f"test_one_rank_fails[{culprit}] FAILED" in failures.text
    assert f"ValueError: rank {culprit} has its day" in failures.text
    assert culprit == 0 or f"-- rank {culprit} --" in failures.text


@needs_mpirun
def test_setup_that_fails_or_skips_on_one_rank_keeps_the_ranks_in_step(project):
    project.test("""\
        from mpi4py import MPI
        import pytest

        pytestmark = pytest.mark.collective

        @pytest.fixture
        def broken():
            if MPI.COMM_WORLD.rank == 1:
                raise RuntimeError("no such thing here")

        @pytest.fixture
        def absent():
            if MPI.COMM_WORLD.rank == 1:
                pytest.skip("not on this rank")

        def test_broken(broken):
            MPI.COMM_WORLD.Barrier()

        def test_absent(absent):
            MPI.COMM_WORLD.Barrier()

        @pytest.mark.xfail(strict=True)
        def test_expected():
            assert False

        def test_last():
            MPI.COMM_WORLD.Barrier()
        """)
    done = project.run("-o", "mpi_grace=10", ranks=2)
    assert done.returncode == 1, done.text
    assert "1 passed, 1 skipped, 1 xfailed, 1 error" in done.text
    assert "no such thing here" in done.text
    assert done.seconds < 10


@needs_mpirun
@pytest.mark.parametrize("culprit", [0, 1])
def test_a_rank_that_fails_inside_a_collective_call_ends_the_job_with_its_report(project, culprit):
    project.test(f"""\
        from mpi4py import MPI
        import pytest

        @pytest.mark.collective
        def test_hang():
            if MPI.COMM_WORLD.rank == {culprit}:
                raise ValueError("the others wait in vain")
            MPI.COMM_WORLD.Barrier()
        """)
    done = project.run("-o", "mpi_grace=2", ranks=3)
    assert done.returncode != 0
    assert "the others wait in vain" in done.text
    assert "the job is ended" in done.text
    assert done.seconds < 20


@needs_mpirun
def test_ranks_must_collect_the_same_tests(project):
    project.test("""\
        from mpi4py import MPI
        import pytest

        pytestmark = pytest.mark.collective

        if MPI.COMM_WORLD.rank == 1:
            def test_here_only(): pass

        def test_everywhere(): pass
        """)
    done = project.run("-o", "mpi_grace=5", ranks=2)
    assert done.returncode != 0
    assert "rank 1 collected other tests than rank 0" in done.text and "test_here_only" in done.text


@needs_mpirun
def test_a_chapter_that_fails_on_one_rank_names_its_line(project):
    project.chapter("""\
        ---
        tests: collective
        ---
        # It

        ```pycon
        >>> from mpi4py import MPI
        >>> MPI.COMM_WORLD.rank
        0
        ```

        ```{code-cell} python
        from mpi4py import MPI; assert MPI.COMM_WORLD.rank == 0
        ```
        """)
    done = project.run("-o", "mpi_grace=5", ranks=2)
    assert done.returncode == 1
    assert "2 failed" in done.text
    assert "01-it.md:8: DocTestFailure" in done.text and "01-it.md:13: AssertionError" in done.text
