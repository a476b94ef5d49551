"""Look at every page of the rendered book, as a reader with a wide window and one with a telephone see it.

    python tools/check_book.py [_build/html] [--only PATTERN]

opens each page in headless Chromium, at 1400 and at 400 pixels, and prints a line for each fault: what sticks out of the
page or is cut off, pictures that are missing or cannot be seen in one of the themes, formulas that were not typeset, links that lead nowhere, what would be
fetched from elsewhere.  It exits with 1 if there are faults, and with 2 if it could not look.

No name but the book's own server is resolved, so that the result is the same with and without a network; links to other
sites are not followed.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import json
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # run as a program: its parts are found from here
# ruff: noqa: E402

from tools.browser import Browser, NoBrowser, served

WIDTHS = 1400, 400


# -- What a page looks like ---------------------------------------------------------------------------------

COMMON = r"""
const name = e => {
    const classes = [...e.classList].slice(0, 3).map(c => '.' + c).join('');
    const words = e.textContent.trim().replace(/\s+/g, ' ').slice(0, 40);
    return e.tagName.toLowerCase() + (e.id ? '#' + e.id : classes) + (words ? ` (“${words}”)` : '');
};
const shown = e => e.checkVisibility({visibilityProperty: true}) && e.getClientRects().length > 0;
const article = document.querySelector('article') || document.querySelector('main') || document.body;
"""

READY = (
    "(async () => {"
    + COMMON
    + r"""
    const faults = [];
    const late = (promise, ms) => Promise.race([promise, new Promise(done => setTimeout(done, ms))]);
    if (window.MathJax && MathJax.startup && MathJax.startup.promise) await late(MathJax.startup.promise, 60000);
    for (const picture of document.querySelectorAll('img')) {
        picture.loading = 'eager';
        try { await late(picture.decode(), 10000); } catch { }
        if (!picture.naturalWidth)
            faults.push(`the picture ${picture.getAttribute('src').slice(0, 80)} is missing or broken`);
        const words = picture.getAttribute('alt');  // Sphinx writes the name of the file where nobody wrote anything
        if (words === null || (ALT && /(^\s*$)|_images\/|\.(png|svg|jpe?g)$/.test(words)))
            faults.push(`the picture ${picture.getAttribute('src').slice(0, 80)} has no alternative text`);
    }
    for (const formula of article.querySelectorAll('.math'))
        if (!formula.querySelector('mjx-container'))
            faults.push(`a formula was not typeset: ${formula.textContent.trim().slice(0, 60)}`);
    for (const error of document.querySelectorAll('mjx-merror, [data-mjx-error]'))
        faults.push(`MathJax says: ${error.getAttribute('data-mjx-error') || error.textContent.trim()}`);
    for (const word of document.querySelectorAll('mjx-mtext[style*="red"]'))
        faults.push(`MathJax does not know a command in: ${name(word.closest('.math') || word)}`);
    const texts = document.createTreeWalker(article, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
        const text = texts.currentNode, parent = text.parentElement;
        if (parent.closest('pre, code, script, style, noscript, mjx-container, .math, textarea')) continue;
        const raw = text.data.match(/\\[()\[\]][^\n]*|\$\$[^\n]*|\\begin\{[^\n]*|(?<![\w$])\$[^$\s][^$]*\$(?!\w)/);
        if (raw) faults.push(`raw TeX in the text: ${raw[0].slice(0, 60)}`);
    }
    if (!document.documentElement.lang) faults.push('the page does not say its language');
    if (!document.title.trim()) faults.push('the page has no title');
    return faults;
})()"""
)

# Pictures that are drawn for both themes are transparent.  Their lines and letters, with the page on
# both sides, must differ from it in either; the borders of maps and bars need not.
INK = r"""
(async () => {
    const faults = [], root = document.documentElement, theme = root.dataset.theme;
    const light = ([r, g, b]) => {
        const line = [r, g, b].map(c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        return 0.2126 * line[0] + 0.7152 * line[1] + 0.0722 * line[2];
    };
    const contrast = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const pictures = [...document.querySelectorAll('img.dark-light')].filter(p => p.naturalWidth);
    const grounds = {};
    for (const name of ['light', 'dark']) {
        root.dataset.theme = name;
        let around = document.querySelector('article') || document.body, colour = null;
        for (; around && !colour; around = around.parentElement) {
            const parts = getComputedStyle(around).backgroundColor.match(/[\d.]+/g).map(Number);
            if (parts.length < 4 || parts[3] > 0) colour = parts;
        }
        grounds[name] = light(colour || [255, 255, 255]);
    }
    root.dataset.theme = theme || '';
    for (const picture of pictures) {
        const canvas = document.createElement('canvas');
        const width = canvas.width = Math.min(picture.naturalWidth, 900);
        const height = canvas.height = Math.round(picture.naturalHeight * width / picture.naturalWidth);
        const pen = canvas.getContext('2d', {willReadFrequently: true});
        pen.drawImage(picture, 0, 0, width, height);
        const pixels = pen.getImageData(0, 0, width, height).data, at = (x, y) => 4 * (y * width + x);
        let border = 0;
        const unseen = {light: 0, dark: 0};
        const clear = (x, y) => pixels[at(x, y) + 3] < 30;
        for (let y = 5; y < height - 5; y++) for (let x = 5; x < width - 5; x++) {
            const i = at(x, y);
            if (pixels[i + 3] < 200) continue;
            if (!(clear(x - 5, y) && clear(x + 5, y)) && !(clear(x, y - 5) && clear(x, y + 5))) continue;
            border++;
            const ink = light(pixels.subarray(i, i + 3));
            for (const name in grounds) if (contrast(ink, grounds[name]) < 1.5) unseen[name]++;
        }
        for (const name in grounds)
            if (unseen[name] > 0.1 * border)
                faults.push(`of the picture ${picture.getAttribute('src').slice(0, 80)} ${Math.round(100 * unseen[name] / border)} % cannot be seen in the ${name} theme`);
    }
    return faults;
})()
"""

FITS = (
    "(async () => {"
    + COMMON
    + r"""
    await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
    const faults = [], width = innerWidth;
    const page = document.scrollingElement;
    if (page.scrollWidth > width + 1) faults.push(`the page is ${page.scrollWidth} px wide`);
    const cut = [];  // what has been told already, with all that is inside
    const tell = (element, words) => { cut.push(element); faults.push(`${name(element)} ${words}`); };
    for (const element of article.querySelectorAll('*')) {
        if (element.closest('mjx-container, svg, .visually-hidden, .sr-only') || !shown(element)) continue;
        if (cut.some(other => other.contains(element))) continue;
        const style = getComputedStyle(element), box = element.getBoundingClientRect();
        const clips = /hidden|clip/.test(style.overflowX);
        // Of a formula only what is drawn counts, and not the text for screen readers beside it.
        const drawn = element.matches('.math') && element.querySelector('mjx-math, svg');
        const more = drawn ? Math.round(drawn.getBoundingClientRect().right - box.right)
                           : element.scrollWidth - element.clientWidth;
        if (clips && element.clientWidth > 1 && more > 1 && style.textOverflow !== 'ellipsis')
            tell(element, `hides ${more} px of what it holds`);
        else if (box.right > width + 1 || box.left < -1) {
            let around = element.parentElement;
            while (around && !/auto|scroll/.test(getComputedStyle(around).overflowX)) around = around.parentElement;
            if (!around || around === page || around === document.body || around.getBoundingClientRect().right > width + 1)
                tell(element, `ends ${Math.round(Math.max(box.right - width, -box.left))} px beyond the window`);
        }
    }
    return faults;
})()"""
)


def look(browser: Browser, address: str, home: str, alt: bool = True) -> Iterator[str]:
    """The faults of one page that only a browser sees."""
    browser.resize(WIDTHS[0])
    browser.open(address)
    yield from browser.evaluate(READY.replace("ALT", json.dumps(alt)))
    yield from browser.evaluate(INK)
    for width in WIDTHS:
        browser.resize(width)
        for fault in browser.evaluate(FITS):
            yield f"at {width} px: {fault}"
    wanted = {}
    for event in browser.events:
        given = event.get("params", {})
        match event.get("method"):
            case "Network.requestWillBeSent":
                wanted[given["requestId"]] = url = given["request"]["url"]
                if not url.startswith((home, "data:", "blob:", "about:")):
                    yield f"it would fetch {url} from elsewhere"
            case "Network.responseReceived" if given["response"]["status"] >= 400:
                url = given["response"]["url"].removeprefix(home)
                if not url.endswith("favicon.ico"):
                    yield f"{url} is missing"
            case "Runtime.exceptionThrown":
                details = given["exceptionDetails"]
                words = details.get("exception", {}).get("description", details["text"]).splitlines()[0]
                yield f"a script failed: {words}"


# -- Links --------------------------------------------------------------------------------------------------


class Links(HTMLParser):
    """The anchors of a page, and the links out of it with their lines."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: dict[str, int] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for key, value in attributes:
            if value and (key == "id" or (key == "name" and tag == "a")):
                self.anchors.add(value)
            elif value and key in ("href", "src") and tag in ("a", "area", "link", "script", "img", "source"):
                self.links.setdefault(value, self.getpos()[0])


def dead_links(root: Path, pages: list[Path]) -> Iterator[tuple[Path, str]]:
    """Links and anchors inside of the book that lead nowhere."""

    @functools.cache
    def read(path: Path) -> Links:
        return Links(path.read_text(encoding="utf-8"))

    for page in pages:
        for link in read(page).links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            anchor = unquote(urldefrag(link).fragment)
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            if target.is_dir():
                target /= "index.html"
            if not target.is_file() or not target.is_relative_to(root):
                yield page, f"the link {link} leads to no file"
            elif anchor and target.suffix == ".html" and anchor not in read(target).anchors:
                yield page, f"the link {link} leads to no anchor"


# -- The whole ----------------------------------------------------------------------------------------------


def faults(root: Path, only: str = "*", alt: bool = True) -> Iterator[tuple[str, str]]:
    """All faults of the pages whose path fits a pattern, as pairs of page and words.

    Among them pictures that have no alternative text but the name of a file, unless ``alt`` is false.
    """
    root = root.resolve()
    pages = [path for path in sorted(root.rglob("*.html")) if "_static" not in path.parts]
    pages = [path for path in pages if fnmatch.fnmatch(path.relative_to(root).as_posix(), only)]
    if not pages:
        raise NoBrowser(f"there are no such pages in {root}; `make book` makes them")
    for page, words in dead_links(root, pages):
        yield page.relative_to(root).as_posix(), words
    with served(root) as home, Browser() as browser:
        for page in pages:
            path = page.relative_to(root).as_posix()
            yield from ((path, words) for words in dict.fromkeys(look(browser, home + path, home, alt)))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("root", nargs="?", default="_build/html", type=Path)
    parser.add_argument("--only", default="*", metavar="PATTERN", help="pages, such as 'book/chapters/016*'")
    parser.add_argument(
        "--alt",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="pictures must have an alternative text, not a file's name",
    )
    options = parser.parse_args(arguments)
    count = 0
    try:
        for page, words in faults(options.root, options.only, options.alt):
            print(f"{page}: {words}", flush=True)
            count += 1
    except NoBrowser as error:
        print(f"check_book: {error}", file=sys.stderr)
        return 2
    print(f"{count or 'no'} fault{'' if count == 1 else 's'}", file=sys.stderr)
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
