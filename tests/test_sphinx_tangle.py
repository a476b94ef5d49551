"""The rendered book: captions and links of canonical blocks, the reference of the package, and a build that cannot be fooled."""

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
    chapters/901-api
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

    Factors = list[float]  # by what
    Scales = dict


    def scale(x_: Factors) -> float | None:
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

    ```python {.illustration}
    an = "illustration"
    ```

    ```{code-cell} python
    from small.scale import scale
    print("scaled:", scale(21))
    ```
    """

SECOND = """\
    # Second

    We call {py:func}`scale` again, and {py:class}`small.Scaler` or {py:class}`small.scale.Scaler`.
    What we call {py:meth}`small.scale.Again.again` is inherited.

    ```python {#scale}
    class Scaler:
        '''Scales again and again. But not too often.'''

        def __init__(self, factors: "Factors", times: int = 2) -> None:
            pass

        def again(self, *, than: "Scaler") -> "Scaler":
            '''Scale.'''
            return than

        @property
        def factor(self):
            '''By what.'''
            return 2


    class Again(Scaler):
        '''Inherits.'''
    ```

    ```python {#other file="small/other.py"}
    '''Has a type of the same name.'''
    Factors = list[int]  # others
    ```

    ```python {#package file="small/__init__.py"}
    '''Small.'''
    from .scale import Scaler

    __all__ = ["Scaler"]
    ```
    """

API = """\
    # Reference

    :::{api-names}
    small.Scaler
    small.scale.scale small.Scaler.again -- what scales
    :::

    :::{api-modules}
    small
    :::

    :::{api-modules}
    :rest:
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
        self.chapter("chapters/901-api", API)
        self.call("tools/tangle.py", "--force").check_returncode()

    def chapter(self, name, text):
        path = self.root / "book" / f"{name}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text))

    def build(self, *options):
        command = "-m", "sphinx", "-n", "-W", "--keep-going", "-b", "html", *options, ".", "_build/html"
        return self.call(*command)

    def call(self, *arguments):
        env = os.environ | {"PYTHONPATH": str(self.root), "NO_COLOR": "1"}
        done = subprocess.run(
            [sys.executable, *arguments], cwd=self.root, env=env, capture_output=True, text=True
        )
        done.text = done.stdout + done.stderr
        return done

    def page(self, name, folder="chapters"):
        return (self.root / "_build" / "html" / "book" / folder / f"{name}.html").read_text()


def links(html):
    """The links of a page, as pairs of words and address."""
    return {
        (re.sub(r"<[^>]+>", "", words).strip(), address)
        for address, words in re.findall(r'<a [^>]*href="([^"]+)"[^>]*>(.*?)</a>', html, re.S)
    }


def test_blocks_have_captions_and_are_linked_both_ways(built):
    first, second = built.page("01-first"), built.page("02-second")
    assert 'id="block-scale"' in first and 'id="block-scale-2"' in second
    assert first.count('class="tangle-caption"') == 3
    assert re.search(r'class="tangle illustration[^>]*>\s*<p class="tangle-caption">illustration</p>', first)
    assert ("in “Second”", "02-second.html#block-scale-2") in links(first)
    assert ("in “First”", "01-first.html#block-scale") in links(second)
    assert ("small/scale.py", "#block-scale") in links(first)  # used in
    assert ("Double the value", "#block-double-the-value") in links(first)  # the comment that includes it
    assert "In this chapter" in first and "In this chapter From" not in first


def test_the_first_page_of_the_reference_is_a_table(built):
    api = built.page("901-api")
    words = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", api))
    assert "Scaler Scales again and again. small" in words  # the first sentence
    assert "scale Scaler.again What scales. small.scale small" in words
    assert ("Scaler", "../api/small.html#small.Scaler") in links(api)
    assert ("scale", "../api/small.scale.html#small.scale.scale") in links(api)
    assert ("small.scale", "../api/small.scale.html#module-small.scale") in links(api)  # which nobody listed


def test_the_page_of_a_module_leads_to_the_blocks(built):
    page = built.page("small.scale", "api")
    assert ("[source]", "../../book/chapters/01-first.html#block-scale") in links(page)
    assert ("First", "../chapters/01-first.html") in links(page)
    assert "By what." in page and '<span class="pre">x_</span>' in page
    assert ("scale()", "../api/small.scale.html#small.scale.scale") in links(built.page("02-second"))


def test_signatures_have_types_that_lead_to_what_they_mean(built):
    page, other = built.page("small.scale", "api"), built.page("small", "api")
    assert "list[float]" in re.sub(r"<[^>]+>", "", page) and "mutable sequence" not in page
    assert "new empty dictionary" not in page
    assert ("Factors", "#small.scale.Factors") in links(page)
    assert ("Factors", "small.scale.html#small.scale.Factors") in links(other)  # where the class was written
    assert ("Scaler", "#small.Scaler") in links(other)


def test_a_name_is_documented_once_where_programs_look_for_it(built):
    assert 'id="small.Scaler"' in built.page("small", "api")
    assert 'id="small.scale.Scaler"' not in built.page("small.scale", "api")
    assert ("Scaler", "small.html#small.Scaler") in links(built.page("small.scale", "api"))
    assert ("[source]", "../../book/chapters/02-second.html#block-scale-2") in links(
        built.page("small", "api")
    )
    second = links(built.page("02-second"))
    assert ("small.Scaler", "../api/small.html#small.Scaler") in second
    assert ("small.scale.Scaler", "../api/small.html#small.Scaler") in second
    assert ("small.scale.Again.again()", "../api/small.html#small.Scaler.again") in second


def test_a_class_tells_what_it_inherits(built):
    page = built.page("small.scale", "api")
    assert ("Scaler", "small.html#small.Scaler") in links(page)
    assert ("again", "small.html#small.Scaler.again") in links(page)


def test_lists_of_terms_in_docstrings_keep_their_names():
    from tools import sphinx_api

    rows = sphinx_api.markdown("It has\n\nvjp(node, _y) : one\n    product;\njvp : another.")
    assert rows == ["It has", "", "", "- `vjp(node, _y)`: one", "    product;", "", "- `jvp`: another."]


def test_names_that_do_not_exist_fail_the_build_and_pages_of_old_modules_go(site):
    site.chapter(
        "chapters/901-api", API.replace("small.Scaler\n", "small.Skaler\n").replace("small\n", "smaller\n")
    )
    old = site.root / "book" / "api" / "old.md"
    old.write_text("# Old")
    done = site.build()
    assert done.returncode != 0 and not old.exists()
    assert "nothing that is called small.Skaler" in done.text and "no module smaller" in done.text


def test_the_reference_of_the_package_is_whole():
    from tools import reference, sphinx_api

    modules, names = sphinx_api.api_page("book/chapters/901-api")
    assert [name for name in names if sphinx_api.find(name) is None] == []
    assert set(modules) <= set(sphinx_api.files())
    for path in "vmad_lit.Builder", "vmad_lit.lib.fastpm.ParticleMesh":
        member, _ = sphinx_api.find(path)
        assert ".".join(sphinx_api.shown_at(modules, member.module, member.name)) == path
    for module in "vmad_lit", "vmad_lit.core.stdlib", "vmad_lit.core.checkpoint":
        for name in reference.exported(module):
            assert sphinx_api.find(f"{module}.{name}") is not None or name == "stdlib", f"{module}.{name}"
    borrowed = {kind.__doc__ for kind in (dict, list, tuple, set, str, int, float)}
    for module in sphinx_api.files():
        for member in reference.members(module):
            assert reference.docstring(member) not in borrowed, (module, member.name)


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


def test_code_that_does_not_say_what_it_is_stops_the_build(site):
    site.chapter("chapters/01-first", FIRST.replace(" {.illustration}", ""))
    done = site.build()
    assert done.returncode != 0
    line = FIRST[: FIRST.index("```python {.illustration}")].count("\n") + 1
    assert f"book/chapters/01-first.md:{line}: a fence that is neither tangled nor run" in done.text


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
