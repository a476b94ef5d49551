"""The index of subjects: concepts of the chapters and of the glossary, and no names of the package."""

import re

import pytest

pytestmark = [pytest.mark.serial, pytest.mark.timeout(300)]
sphinx_subjects = pytest.importorskip("tools.sphinx_subjects")
Site = pytest.importorskip("test_sphinx_tangle").Site

INDEX = """\
    # Book

    ```{toctree}
    chapters/01-first
    chapters/02-second
    chapters/901-api
    glossary
    subjects
    ```
    """

GLOSSARY = """\
    # Glossary

    :::{glossary}
    halo
      What surrounds a slab.
    :::
    """

FIRST = """\
    # First

    ```python {#scale file="small/scale.py"}
    '''Scaling.'''


    def scale():
        '''Scale.'''
    ```

    A {index}`Halo` is read. The {index}`exchange <halo; exchange>` of a halo, {index}`halo` again, and an {index}`Élan`.
    """

SECOND = """\
    # Second

    Once more the {index}`halo`, an {index}`!adjoint`, {index}`ghosts <see: ghost; halo>` and
    {index}`both <pair: sum; product>`.
    """


def test_entries_are_the_same_whatever_their_case_and_accents():
    assert sphinx_subjects.key("Élan") == "elan"
    assert sphinx_subjects.key("$`Fourier") == "fourier"
    assert list(sphinx_subjects.paths("pair", "sum; product")) == [
        (["sum", "product"], ""),
        (["product", "sum"], ""),
    ]
    assert list(sphinx_subjects.paths("see", "ghost; halo")) == [(["ghost"], "halo")]
    assert list(sphinx_subjects.paths("single", "halo; exchange")) == [(["halo", "exchange"], "")]


def test_the_page_lists_concepts_with_their_chapters(tmp_path):
    site = Site(tmp_path)
    site.chapter("index", INDEX)
    site.chapter("chapters/01-first", FIRST)
    site.chapter("chapters/02-second", SECOND)
    site.chapter("chapters/901-api", "    # Reference\n\n    :::{api-modules}\n    :rest:\n    :::\n")
    site.chapter("glossary", GLOSSARY)
    site.chapter("subjects", "    # Subjects\n\n    :::{subject-index}\n    :::\n")
    site.call("tools/tangle.py", "--force").check_returncode()

    def entries():
        done = site.build()
        assert done.returncode == 0, done.text
        page = site.page("subjects", "")
        page = page[page.index("<h1>") : page.index("</article>")]
        rows = re.findall(r"<li>\s*<p>(.*?)</p>", page, re.S)
        return [re.sub(r"<(?!strong|a )[^>]+>|</\w+>| class=\"[^\"]*\"", "", row) for row in rows], page

    rows, page = entries()
    assert rows == [
        'adjoint, <a href="chapters/02-second.html#index-1"><strong>Second',
        'Élan, <a href="chapters/01-first.html#index-3">First',
        "ghost, see halo",
        'Halo, <a href="glossary.html#term-halo"><strong>Glossary, <a href="chapters/01-first.html#index-0">First, '
        '<a href="chapters/01-first.html#index-2">2, <a href="chapters/02-second.html#index-0">Second',
        'exchange, <a href="chapters/01-first.html#index-1">First',
        "product",
        'sum, <a href="chapters/02-second.html#index-3">Second',
        "sum",
        'product, <a href="chapters/02-second.html#index-3">Second',
    ]
    assert "scale" not in page and 'href="#subjects-h"' in page and 'id="subjects-h"' in page
    assert "scale()" in (site.root / "_build" / "html" / "genindex.html").read_text()
    site.chapter(
        "chapters/02-second", SECOND.replace("!adjoint", "tangent")
    )  # another page than that of the index
    rows, _ = entries()
    assert 'tangent, <a href="chapters/02-second.html#index-1">Second' in rows
    assert not any(row.startswith("adjoint") for row in rows)
