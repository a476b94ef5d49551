"""The book as an EPUB and as a PDF: a small one is made, and looked into."""

import re
import shutil
import xml.etree.ElementTree as ET
import zipfile
from posixpath import dirname, join, normpath

import pytest

from tools import browser

pytestmark = [
    pytest.mark.serial,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not any(map(shutil.which, browser.BROWSERS)), reason="there is no Chromium"),
]
print_book = pytest.importorskip("tools.print_book")
Site = pytest.importorskip("test_sphinx_tangle").Site

INDEX = "    # Book\n\n    ```{toctree}\n    :caption: I. The part\n    chapters/01-first\n    chapters/901-api\n    ```\n"

PAGE = r'''
    ---
    file_format: mystnb
    kernelspec: {name: python3, display_name: Python 3}
    ---
    # First

    ```python {#scale file="small/scale.py"}
    """Nothing."""


    def scale():
        """Scale."""
    ```

    ```python {#package file="small/__init__.py"}
    """Small."""
    ```

    The inline $x_1 < y^2$, and by {eq}`eq-first` we see

    $$
    \dd x = \frac{1}{2} \sum_i \alpha_i .
    $$ (eq-first)

    :::{margin}
    An aside.
    :::

    ```{code-cell} python
    ---
    mystnb:
      image:
        alt: Nothing at all.
      figure:
        caption: An empty picture.
    ---
    from IPython.display import HTML, SVG, display
    display(HTML("<details open>one<br>two</details>"))
    SVG("<svg xmlns='http://www.w3.org/2000/svg' width='10' height='10'></svg>")
    ```

    :::{dropdown} Solution
    Of the exercise.
    :::

    Back to [the beginning](../index.md) and to {py:func}`small.scale.scale`.
    '''


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    site = Site(tmp_path_factory.mktemp("paper"))
    site.chapter("index", INDEX)
    site.chapter("chapters/01-first", PAGE.lstrip("\n"))
    site.chapter("chapters/901-api", "    # Reference\n\n    :::{api-modules}\n    :rest:\n    :::\n")
    (site.root / "book" / "chapters" / "02-second.md").unlink()
    site.call("tools/tangle.py", "--force").check_returncode()
    return site


def test_the_epub_is_well_formed_and_has_formulas_as_mathml(site):
    command = "-m", "sphinx", "-n", "-W", "--keep-going", "-b", "epub", "-t", "epub", "-d", "_build/doctrees"
    done = site.call(*command, ".", "_build/epub")
    assert done.returncode == 0, done.text
    with zipfile.ZipFile(site.root / "_build" / "epub" / "vmad_lit.epub") as packed:
        names = packed.namelist()
        texts = {
            name: packed.read(name).decode() for name in names if name.endswith((".xhtml", ".opf", ".ncx"))
        }
    assert names[0] == "mimetype"
    anchors = {}
    for name, text in texts.items():
        anchors[name] = {element.get("id") for element in ET.fromstring(text).iter()}
    for name, text in texts.items():
        for link in re.findall(r'(?:href|src)="(?!\w+:)([^"]+)"', text):
            path, _, anchor = link.partition("#")
            target = normpath(join(dirname(name), path)) if path else name
            assert target in names and (not anchor or anchor in anchors[target]), (name, link)
    page = texts["book/chapters/01-first.xhtml"]
    assert page.count("<math") == 2 and "<mfrac>" in page and 'display="block"' in page and "(1)" in page
    assert "An aside." in page and '<details open=""' in page and "<br/>" in page and "<img" in page
    assert "tex2jax" not in "".join(re.findall("<script.*?</script>", page))
    assert "chapters/01-first.xhtml" in texts["nav.xhtml"]
    item = next(row for row in re.findall("<item [^>]*>", texts["content.opf"]) if "01-first" in row)
    assert "mathml" in item


def test_the_pdf_has_the_pages_with_links_and_an_outline(site):
    done = site.build()
    assert done.returncode == 0, done.text
    root, output = site.root / "_build" / "html", site.root / "book.pdf"
    assert "<math" not in site.page("01-first")  # the pages of the web leave that to MathJax
    text = print_book.whole(root)
    assert text.index("I. The part") < text.index('id="book-chapters-01-first"') < text.index("<h1>Reference")
    assert 'id="book-chapters-01-first--block-scale"' in text  # anchors of different pages are different
    assert 'href="#book-index"' in text and "api/small.scale" not in text
    assert 'class="headerlink"' not in text and re.search(r"<details[^>]*sd-dropdown[^>]*open", text)
    assert print_book.main([str(root), str(output)]) == 0
    pdf = output.read_bytes()
    assert pdf.startswith(b"%PDF") and 5 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 7
    titles = re.findall(rb"/Title \(([^)]*)\)", pdf)
    assert [title for title in titles if title in (b"Book", b"First", b"Reference")] == [
        b"Book",
        b"First",
        b"Reference",
    ]
    assert b"FirstFirst" not in pdf


def test_a_title_that_is_told_twice_is_told_once_at_the_same_length():
    pdf = b"<</Title (How toHow to)\n/Title (Tell it)\n/Title (A \\(b\\)A \\(b\\))\n/Title <FEFF00410041>"
    plain = print_book.with_plain_titles(pdf)
    assert len(plain) == len(pdf)
    assert (
        re.sub(rb" +", b" ", plain)
        == b"<</Title (How to) \n/Title (Tell it)\n/Title (A \\(b\\)) \n/Title <FEFF0041> "
    )
