"""Pictures without alternative text or caption fail the build, whoever draws them."""

import re

import pytest

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

    found = re.findall(r"01-first.md:(\d+): WARNING: (a picture .*?):", done.text)
    assert sorted((int(number), words) for number, words in found) == sorted(
        [
            (line("{code-cell}", 1), "a picture has no alternative text and no caption"),
            (line("{code-cell}", 3), "a picture has no caption"),
            (line("{code-cell}", 4), "a picture within HTML has no alternative text"),
            (line("{figure}", 1), "a picture has no alternative text"),
            (line("![]"), "a picture has no alternative text and no caption"),
            (line("![dot.svg]"), "a picture has no alternative text and no caption"),
        ]
    )
    assert site.build("-D", "pictures_need_words=0").returncode == 0
