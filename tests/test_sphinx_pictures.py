"""Pictures without alternative text or caption, and captions without a picture, fail the build, whoever draws them."""

import re

import pytest

nodes = pytest.importorskip("docutils.nodes")
pytestmark = [pytest.mark.serial, pytest.mark.timeout(300)]
Site = pytest.importorskip("test_sphinx_tangle").Site

INDEX = "    # Book\n\n    ```{toctree}\n    chapters/01-first\n    ```\n"

PAGE = '''\
    ---
    file_format: mystnb
    kernelspec: {name: python3, display_name: Python 3}
    ---
    # First

    ```python {#scale file="small/scale.py"}
    """Nothing."""
    ```

    ```{code-cell} python
    from IPython.display import HTML, SVG
    svg = "<svg xmlns='http://www.w3.org/2000/svg' width='10' height='10'></svg>"
    SVG(svg)
    ```

    ```{code-cell} python
    ---
    mystnb:
      image:
        alt: "An empty square."
      figure:
        caption: "What *nothing* looks like."
    ---
    SVG(svg)
    ```

    ```{code-cell} python
    ---
    mystnb:
      image:
        alt: "An empty square."
    ---
    SVG(svg)
    ```

    ```{code-cell} python
    ---
    mystnb:
      image:
        alt: "A square that is never shown."
      figure:
        caption: "What nothing looks like, if the last line is forgotten."
    ---
    square = SVG(svg)
    print("drawn, but for whom?")
    ```

    ```{code-cell} python
    ---
    mystnb:
      figure:
        caption: "An empty square, drawn by hand."
    ---
    HTML(svg.replace("<svg", "<svg role='img' aria-label='An empty square.'"))
    ```

    ```{code-cell} python
    HTML(svg)
    ```

    ```{code-cell} python
    HTML(svg.replace("<svg", "<svg role='img' aria-label='An empty square.'"))
    ```

    :::{figure} dot.svg
    A caption is no alternative text.
    :::

    :::{figure} dot.svg
    :alt: A dot.

    Both.
    :::

    :::{card} A card
    :img-top: dot.svg
    :img-alt: A dot.

    With words of its own.
    :::

    ![](dot.svg)

    ![dot.svg](dot.svg)
    '''


def test_pictures_without_words_fail_the_build(tmp_path):
    site = Site(tmp_path)
    site.chapter("index", INDEX)
    site.chapter("chapters/01-first", PAGE)
    for name in "02-second", "901-api":
        (site.root / "book" / "chapters" / f"{name}.md").unlink()
    dot = "<svg xmlns='http://www.w3.org/2000/svg' width='10' height='10'></svg>"
    (site.root / "book" / "chapters" / "dot.svg").write_text(dot)
    site.call("tools/tangle.py", "--force").check_returncode()
    done = site.build("-D", "pictures_need_words=1")
    assert done.returncode != 0
    lines = PAGE.splitlines()

    def line(words, nth=1):
        return [number for number, row in enumerate(lines, 1) if words in row][nth - 1]

    found = re.findall(r"01-first.md:(\d+): WARNING: (a picture .*?|a cell .*?):", done.text)
    assert sorted((int(number), words) for number, words in found) == sorted(
        [
            (line("{code-cell}", 1), "a picture has no alternative text and no caption"),
            (line("{code-cell}", 3), "a picture has no caption"),
            (
                line("{code-cell}", 4),
                "a cell that has a figure's caption or alternative text draws no picture",
            ),
            (line("{code-cell}", 6), "a picture within HTML has no alternative text"),
            (line("{figure}", 1), "a picture has no alternative text"),
            (line("![]"), "a picture has no alternative text and no caption"),
            (line("![dot.svg]"), "a picture has no alternative text and no caption"),
        ]
    )
    assert site.build("-D", "pictures_need_words=0").returncode == 0


def test_a_page_that_was_not_executed_lacks_no_pictures():
    pictures = pytest.importorskip("tools.sphinx_pictures")
    figure = {"mystnb": {"figure": {"caption": "Nothing."}}}

    def page(*counts):
        cells = [nodes.container(nb_element="cell_code", exec_count=n, cell_metadata=figure) for n in counts]
        return nodes.section("", *cells)

    assert list(pictures.faults(page(None, None))) == []
    assert (
        len(list(pictures.faults(page(1, None)))) == 2
    )  # an error in the first: the second was to draw, too
