"""What executed cells print names their places in the chapter, and the right ones when the prose has changed."""

import html
import inspect
import re
import traceback
from types import SimpleNamespace

import pytest

from tools import cells
from tools.cells import Cells, Place

pytestmark = pytest.mark.serial

PAGE = """\
    ---
    file_format: mystnb
    kernelspec: {name: python3, display_name: Python 3}
    ---
    # First

    Some prose.

    ```python {#scale file="small/scale.py"}
    '''Scaling.'''
    ```

    ```{code-cell} python
    :tags: [hide-input]

    import sys, warnings
    def here():
        frame = sys._getframe(1)
        return f"{frame.f_code.co_filename}:{frame.f_lineno}"

    print("first", here())
    ```

    ```{code-cell} python
    %load_ext tools.mpirun
    print("second", here())
    warnings.warn("careful")
    ```

    ```{code-cell} python
    %%capture printed
    print("captured", here())
    ```

    ```{code-cell} python
    print(printed.stdout)
    import inspect
    print(inspect.getsource(here))
    ```

    ```{code-cell} python
    %%mpirun -n 1
    import sys
    print(f"ranks {sys._getframe().f_code.co_filename}:{sys._getframe().f_lineno}")
    ```

    ```{code-cell} python
    :tags: [raises-exception]
    def wrong():
        return 1 / 0

    wrong()
    ```
    """


def test_a_cell_is_found_in_the_order_of_the_page():
    page = Cells("07-page.md", [(10, "x = 1"), (20, "\nx = 2\ny = 3\n"), (30, "x = 1")])
    assert page.find("x = 1\n") == Place("07-page.md", 10)
    assert page.find("z") is None
    assert page.find("x = 2\ny = 3") == Place("07-page.md", 20)
    assert page.find("y = 3") == Place("07-page.md", 21)  # what a magic runs
    assert page.find("x = 1") == Place("07-page.md", 30)


def test_code_is_named_after_its_place():
    place = Place("test_cells_page.md", 7)
    names = {}
    exec(cells.compiled("\ndef f():\n    return 1 / 0\n", place), names)
    with pytest.raises(ZeroDivisionError) as error:
        names["f"]()
    last = traceback.extract_tb(error.value.__traceback__)[-1]
    assert (last.filename, last.lineno, last.line) == ("test_cells_page.md", 8, "return 1 / 0")
    exec(cells.compiled("def g(): pass", Place("test_cells_page.md", 3)), names)
    assert inspect.getsource(names["f"]) == "def f():\n    return 1 / 0\n"
    assert inspect.getsource(names["g"]) == "def g(): pass\n"
    with pytest.raises(SyntaxError) as error:
        cells.compiled("x = (", place)
    assert (error.value.filename, error.value.lineno) == ("test_cells_page.md", 7)


def test_outputs_from_the_cache_tell_the_lines_of_today():
    sphinx_cells = pytest.importorskip("tools.sphinx_cells")

    def cell(source, *outputs):
        return SimpleNamespace(cell_type="code", source=source, outputs=list(outputs))

    red = "\x1b[31m"
    frame = f"File {red}7.md:22\x1b[0m, in f\n     {red}21\x1b[0m def f():\n---> {red}22\x1b[0m  1 / 0 # 21"
    notebook = SimpleNamespace(
        cells=[
            cell("a\nb", {"text": "at 7.md:10, 7.md:11, 7.md:12 and 17.md:10 or 7.mdx:10, 7.md:5"}),
            cell("c\nd\ne", {"traceback": ["-----", frame], "evalue": '"7.md", line 20'}),
            cell("f", {"data": {"text/html": "<b>7.md:20", "image/png": "7.md:20", "text/plain": "30"}}),
        ]
    )
    sphinx_cells.rename(notebook, "7.md", [10, 20, 30], [110, 220, 330])
    first, second, third = (cell.outputs[0] for cell in notebook.cells)
    assert first["text"] == "at 7.md:110, 7.md:111, 7.md:12 and 17.md:10 or 7.mdx:10, 7.md:5"
    assert second["traceback"][1] == frame.replace("22\x1b", "222\x1b").replace("21\x1b", "221\x1b")
    assert second["evalue"] == '"7.md", line 220'
    assert third["data"] == {"text/html": "<b>7.md:220", "image/png": "7.md:20", "text/plain": "30"}


@pytest.mark.timeout(300)
def test_the_page_names_chapter_and_line(tmp_path):
    site_of = pytest.importorskip("test_sphinx_tangle").Site
    site = site_of(tmp_path)
    index = "    # Book\n\n    ```{toctree}\n    chapters/01-first\n    ```\n"
    site.chapter("index", index)
    for name in "02-second", "901-api":
        (site.root / "book" / "chapters" / f"{name}.md").unlink()

    def build(page):
        site.chapter("chapters/01-first", page)
        site.call("tools/tangle.py", "--force").check_returncode()
        done = site.build()
        assert done.returncode == 0, done.text
        words = re.sub(r"\x1b\[[\d;]*m|<[^>]+>", "", site.page("01-first"))
        return done.text, html.unescape(words)

    def line(page, code):
        return [row.strip() for row in page.splitlines()].index(code) + 1

    def check(page, words):
        for label, code in [
            ("first", 'print("first", here())'),
            ("second", 'print("second", here())'),
            ("captured", 'print("captured", here())'),
        ]:
            assert f"{label} 01-first.md:{line(page, code)}\n" in words, label
        warned = line(page, 'warnings.warn("careful")')
        assert f"01-first.md:{warned}: UserWarning: careful" in words
        row = 'print(f"ranks {sys._getframe().f_code.co_filename}:{sys._getframe().f_lineno}")'
        assert f"[0] ranks 01-first.md:{line(page, row)}\n" in words
        assert words.count("def here():") == 2  # the cell, and its source as a cell finds it
        wrong = line(page, "wrong()")
        assert f"File 01-first.md:{wrong}\n" in words and f"{wrong} wrong()" in words
        assert f"File 01-first.md:{wrong - 2}, in wrong()" in words and f"> {wrong - 2} " in words
        assert "ipykernel" not in words

    text, words = build(PAGE)
    assert "Executing notebook" in text
    check(PAGE, words)
    longer = PAGE.replace("Some prose.", "Some prose.\n\n    And some more.\n")
    text, words = build(longer)
    assert "Executing notebook" not in text
    check(longer, words)
