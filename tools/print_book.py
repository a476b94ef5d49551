"""Print the rendered book: all pages, in the order of reading, as one PDF.

    python tools/print_book.py [_build/html] [_build/vmad_lit.pdf] [--pages N]

puts the articles of the pages that ``make book`` has made into one page, whose links lead from place to place inside of
it, and lets headless Chromium print that: with the same formulas, pictures and colours, with page numbers, and with an
outline of chapters and sections.  No TeX is needed.  The pages of the reference, a page for each module, are left out, and
links to them are plain words; so are the programs behind the pictures, which the screen hides, too.
"""

from __future__ import annotations

import argparse
import posixpath
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from bs4 import BeautifulSoup, Tag

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # run as a program: its parts are found from here
# ruff: noqa: E402

from tools.browser import Browser, NoBrowser, served

FIRST = "book/index.html"
LEFT_OUT = re.compile(r"book/api/|genindex|py-modindex|search")
PATIENCE = 1200.0  # seconds for typesetting and printing a thousand pages

READY = """
(async () => {
    if (window.MathJax && MathJax.startup && MathJax.startup.promise) await MathJax.startup.promise;
    for (const picture of document.images) { picture.loading = 'eager'; try { await picture.decode(); } catch { } }
    await document.fonts.ready;
    return document.querySelectorAll('.math').length - document.querySelectorAll('.math mjx-container').length;
})()
"""


# -- One page out of many -----------------------------------------------------------------------------------


def pages(root: Path) -> Iterator[tuple[str, BeautifulSoup]]:
    """The pages of the book in the order of reading, by their paths from the root."""
    path, seen = FIRST, set()
    while path and path not in seen:
        seen.add(path)
        soup = BeautifulSoup((root / path).read_text(encoding="utf-8"), "html.parser")
        if not LEFT_OUT.match(path):
            yield path, soup
        following = soup.find("link", rel="next")
        path = address(path, str(following["href"]))[0] if isinstance(following, Tag) else ""


def address(page: str, link: str) -> tuple[str, str]:
    """The path from the root, and the anchor, to which a link on a page leads."""
    path, _, anchor = link.partition("#")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), path)) if path else page
    return unquote(path), unquote(anchor)


def label(page: str, anchor: str = "") -> str:
    """The anchor of a page, or of a place on it, within the whole."""
    name = re.sub(r"\W+", "-", page.removesuffix(".html"))
    return f"{name}--{anchor}" if anchor else name


def whole(root: Path, count: int | None = None) -> str:
    """The book as one page of HTML, for a reader at the root of the rendered pages."""
    found = list(pages(root))[:count]
    known = {path for path, _ in found}
    first = found[0][1]
    parts = list(chapters(first, known))
    body = [title_page(first), contents(parts)]
    start = head(first, found)
    part_of = {path: caption for caption, path, _, _ in parts}
    part = name_of(first)
    for path, soup in found:
        article = soup.find("article")
        assert isinstance(article, Tag), path
        fit_in(article, path, known)
        part = part_of.get(path) or part  # a page that the sidebar does not list belongs to the one before
        body.append(
            f'<article class="bd-article print-chapter" id="{label(path)}"><p class="print-where">{part}</p>'
            f"{article.decode_contents()}</article>"
        )
    return f'<!DOCTYPE html><html lang="en" data-theme="light" data-mode="light">{start}<body><main class="print-book">{"".join(body)}</main></body></html>'


def chapters(first: BeautifulSoup, known: set[str]) -> Iterator[tuple[str, str, bool, str]]:
    """What the sidebar lists: the part, the path of each page, whether it is the first of its part, and its title."""
    caption, new = "", True
    for item in first.select(".bd-sidebar-primary p.caption, .bd-sidebar-primary li.toctree-l1 > a"):
        if item.name == "p":
            caption, new = item.get_text().strip(), True
            continue
        path = address(FIRST, str(item["href"]))[0]
        if path in known and path != FIRST:
            yield caption, path, new, item.get_text().strip()
            new = False


def name_of(first: BeautifulSoup) -> str:
    """The name of the project, which is in the title of each page."""
    return first.title.get_text().rpartition("—")[2].strip() if first.title else ""


def title_page(first: BeautifulSoup) -> str:
    heading = first.select_one("article h1")
    for link in heading.select("a.headerlink") if heading else []:
        link.decompose()
    return f'<section class="print-title"><p class="name">{name_of(first)}</p><p>{heading.get_text() if heading else ""}</p></section>'


def contents(parts: list[tuple[str, str, bool, str]]) -> str:
    rows = []
    for caption, path, new, title in parts:
        if new and caption:
            rows.append(f'<li class="part">{caption}</li>')
        rows.append(f'<li><a href="#{label(path)}">{title}</a></li>')
    return f'<nav class="print-contents"><p class="heading">Contents</p><ul>{"".join(rows)}</ul></nav>'


def head(first: BeautifulSoup, found: list[tuple[str, BeautifulSoup]]) -> str:
    """The styles and the typesetter of formulas, which only pages with formulas have; no other scripts."""
    kept = [str(style) for style in first.select("link[rel=stylesheet]")]
    for path, soup in found:
        scripts = [script for script in soup.find_all("script") if "mathjax" in str(script).lower()]
        if scripts:
            for script in scripts:
                if script.get("src"):
                    script["src"] = moved(path, str(script["src"]))
            kept += map(str, scripts)
            break
    title = first.title.get_text() if first.title else ""
    return f'<head><meta charset="utf-8"><title>{title}</title>{"".join(kept)}</head>'


def moved(page: str, link: str) -> str:
    """A link to a file, as seen from the first page."""
    return posixpath.relpath(address(page, link)[0], posixpath.dirname(FIRST))


def fit_in(article: Tag, page: str, known: set[str]) -> None:
    """Make an article a part of the whole: its anchors, its links, and what a sheet of paper can show."""
    for element in article.select(
        "a.headerlink, button, script, .toctree-wrapper, details.hide, .cell.tag_hide-input > .cell_input"
    ):
        element.decompose()
    for details in article.select("details.sd-dropdown"):
        details["open"] = ""
    for element in article.find_all(id=True):
        element["id"] = label(page, str(element["id"]))
    for picture in article.find_all(src=True):
        if not re.match(r"\w+:", str(picture["src"])):
            picture["src"] = moved(page, str(picture["src"]))
    for link in article.find_all("a", href=True):
        target = str(link["href"])
        if re.match(r"\w+:", target):
            continue
        path, anchor = address(page, target)
        if path in known:
            link["href"] = "#" + label(path, anchor)
        else:
            del link["href"]


# -- Printing -----------------------------------------------------------------------------------------------


def printed(root: Path, html: str) -> bytes:
    """A page of HTML, which may use what is in a folder, as a PDF."""
    with tempfile.NamedTemporaryFile(
        "w", dir=root / posixpath.dirname(FIRST), suffix=".html", encoding="utf-8"
    ) as file:
        file.write(html)
        file.flush()
        with served(root) as home, Browser() as browser:
            browser.patience = PATIENCE
            browser.ask("Emulation.setEmulatedMedia", media="print")
            browser.open(f"{home}{posixpath.dirname(FIRST)}/{Path(file.name).name}")
            missing = browser.evaluate(READY)
            if missing:
                raise NoBrowser(f"{missing} formulas were not typeset")
            done = browser.ask(
                "Page.printToPDF",
                printBackground=True,
                preferCSSPageSize=True,
                generateTaggedPDF=True,
                generateDocumentOutline=True,
                transferMode="ReturnAsStream",
            )
            return with_plain_titles(browser.read_stream(done["stream"]))


#: A title in the outline of a PDF: bytes in parentheses, or UTF-16 in hexadecimal digits.
TITLE = re.compile(rb"/Title (\((?:\\.|[^\\()])*\)|<FEFF[0-9A-F]*>)")


def with_plain_titles(pdf: bytes) -> bytes:
    """The PDF with each title once: of a heading that begins a page Chromium repeats the words.

    Blanks fill what the words leave, so that the places of all objects stay.
    """

    def once(found: re.Match[bytes]) -> bytes:
        mark = 5 if found[1].startswith(b"<") else 1
        begin, words, end = found[1][:mark], found[1][mark:-1], found[1][-1:]
        half = len(words) // 2
        if half and words[:half] == words[half:]:
            return (b"/Title " + begin + words[:half] + end).ljust(len(found[0]))
        return found[0]

    return TITLE.sub(once, pdf)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("root", nargs="?", default="_build/html", type=Path)
    parser.add_argument("output", nargs="?", default="_build/vmad_lit.pdf", type=Path)
    parser.add_argument("--pages", type=int, metavar="N", help="only the first pages of the book")
    options = parser.parse_args(arguments)
    if not (options.root / FIRST).exists():
        parser.error(f"there is no book in {options.root}: `make book` makes it")
    try:
        pdf = printed(options.root, whole(options.root, options.pages))
    except NoBrowser as error:
        print(f"print_book: {error}", file=sys.stderr)
        return 2
    options.output.write_bytes(pdf)
    sheets = len(re.findall(rb"/Type\s*/Page\b", pdf))
    print(f"{options.output}: {sheets} pages, {len(pdf) / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
