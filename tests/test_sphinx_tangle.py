"""The rendered book: captions and links of canonical blocks, the reference, and a build that cannot be fooled."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.serial, pytest.mark.timeout(300)]

for _needed in (
    "sphinx",
    "myst_nb",
    "sphinx_book_theme",
    "sphinx_design",
    "sphinx_copybutton",
    "sphinxcontrib.bibtex",
):
    pytest.importorskip(_needed, reason="the book's tools are not installed")

INDEX = """\
    # A small book

    ```{toctree}
    chapters/01-first
    chapters/02-second
    chapters/91-api
    ```
    """

FIRST = """\
    ---
    file_format: mystnb
    kernelspec: {name: python3, display_name: Python 3}
    ---
    # First

    :::{note} In this chapter
    From nothing to a module.
    :::

    ```python {#scale file="small/scale.py"}
    '''Scaling.'''

    Factors = list[float]


    def scale(x_):
        '''The scaled ``x_``.

        >>> scale(1)
        2
        '''
        # <<Double the value>>
        return y
    ```

    ```python {#double-the-value}
    y = 2 * x_
    ```

    ```python
    an = "illustration"
    ```

    ```{code-cell} python
    from small.scale import scale
    print("scaled:", scale(21))
    ```
    """

SECOND = """\
    # Second

    We call {py:func}`scale` again.

    ```python {#scale}
    class Scaler:
        '''Scales again and again.'''

        @property
        def factor(self):
            '''By what.'''
            return 2
    ```

    ```python {#package file="small/__init__.py"}
    '''Small.'''
    ```
    """

API = """\
    # Reference

    :::{api-package} small
    :::
    """


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A small book, built once."""
    site = Site(tmp_path_factory.mktemp("site"))
    done = site.build()
    assert done.returncode == 0, done.text
    return site


@pytest.fixture
def site(built):
    """The small book, to be changed; put back afterwards."""
    yield built
    built.write()


class Site:
    def __init__(self, root):
        self.root = root
        shutil.copy(ROOT / "conf.py", root)
        shutil.copytree(ROOT / "tools", root / "tools", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(ROOT / "book" / "_static", root / "book" / "_static")
        (root / "book" / "references.bib").write_text("")
        self.write()

    def write(self):
        self.chapter("index", INDEX)
        self.chapter("chapters/01-first", FIRST)
        self.chapter("chapters/02-second", SECOND)
        self.chapter("chapters/91-api", API)
        self.call("tools/tangle.py", "--force").check_returncode()

    def chapter(self, name, text):
        path = self.root / "book" / f"{name}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text))

    def build(self):
        return self.call("-m", "sphinx", "-n", "-W", "--keep-going", "-b", "html", ".", "_build/html")

    def call(self, *arguments):
        env = os.environ | {"PYTHONPATH": str(self.root), "NO_COLOR": "1"}
        done = subprocess.run(
            [sys.executable, *arguments], cwd=self.root, env=env, capture_output=True, text=True
        )
        done.text = done.stdout + done.stderr
        return done

    def page(self, name):
        return (self.root / "_build" / "html" / "book" / "chapters" / f"{name}.html").read_text()


def links(html):
    """The links of a page, as pairs of words and address."""
    return {
        (re.sub(r"<[^>]+>", "", words).strip(), address)
        for address, words in re.findall(r'<a [^>]*href="([^"]+)"[^>]*>(.*?)</a>', html, re.S)
    }


def test_blocks_have_captions_and_are_linked_both_ways(built):
    first, second = built.page("01-first"), built.page("02-second")
    assert 'id="block-scale"' in first and 'id="block-scale-2"' in second
    assert first.count('class="tangle-caption"') == 2  # not the illustration
    assert ("in “Second”", "02-second.html#block-scale-2") in links(first)
    assert ("in “First”", "01-first.html#block-scale") in links(second)
    assert ("small/scale.py", "#block-scale") in links(first)  # used in
    assert ("Double the value", "#block-double-the-value") in links(first)  # the comment that includes it
    assert "In this chapter" in first and "In this chapter From" not in first


def test_the_reference_leads_to_the_blocks(built):
    api = built.page("91-api")
    assert ("[source]", "../../book/chapters/01-first.html#block-scale") in links(api)
    assert ("[source]", "../../book/chapters/02-second.html#block-scale-2") in links(api)
    assert "By what." in api and '<span class="pre">x_</span>' in api
    assert "Factors" not in api  # the name of a type
    assert ("scale()", "91-api.html#small.scale.scale") in links(built.page("02-second"))


def test_cells_are_executed(built):
    assert "scaled: 42" in built.page("01-first")


def test_nothing_is_executed_again_without_need(site):
    site.build()
    done = site.build()
    assert done.returncode == 0 and "Executing notebook" not in done.text


def test_a_change_of_the_package_reaches_the_pages_that_use_it(site):
    site.chapter("chapters/01-first", FIRST.replace("y = 2 *", "y = 3 *"))
    done = site.build()
    assert done.returncode != 0 and "make tangle" in done.text and "small/scale.py" in done.text
    site.call("tools/tangle.py").check_returncode()
    done = site.build()
    assert done.returncode == 0, done.text
    assert "scaled: 63" in site.page("01-first")


def test_a_package_edited_by_hand_stops_the_build(site):
    path = site.root / "small" / "scale.py"
    path.write_text(path.read_text().replace("2 *", "4 *"))
    assert site.build().returncode != 0


def test_a_failing_cell_fails_the_build_every_time(site):
    site.chapter("chapters/01-first", FIRST.replace('print("scaled:", scale(21))', "scale(21) / 0"))
    for _ in range(2):
        done = site.build()
        assert done.returncode != 0
        assert "ZeroDivisionError" in done.text and "01-first" in done.text
        assert "\x1b" not in done.text  # readable in a log, too


def test_a_broken_chapter_is_named_with_its_line(site):
    site.chapter("chapters/02-second", SECOND + "\n    ```python {#nobody-uses-this}\n    x = 1\n    ```\n")
    done = site.build()
    assert done.returncode != 0
    assert re.search(r"book/chapters/02-second.md:\d+: .*nobody-uses-this", done.text), done.text
