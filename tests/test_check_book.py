"""The tool that looks at the pages of the book: a small site with one fault of each kind, and none beside them."""

import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from tools import browser, check_book

ROOT = Path(__file__).resolve().parent.parent
needs_browser = pytest.mark.skipif(
    not any(map(shutil.which, browser.BROWSERS)), reason="there is no Chromium to look with"
)
pytestmark = [pytest.mark.serial, pytest.mark.timeout(300)]

HEAD = '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{}</title></head><body><article>{}</article>'

# What MathJax leaves of a formula that it has typeset.
GOOD = """
<h2 id="here">Good</h2> <p>It costs $5 or $6, and <code>\\(this\\)</code> is code.</p>
<div style="overflow-x: auto"><div style="width: 700px">a table that scrolls</div></div>
<p><span class="math"><mjx-container>x</mjx-container></span> <img src="dot.png" alt="a dot">
<a href="bad.html#there">a link</a> <a href="#here">another</a> <a href="https://example.org/">elsewhere</a></p>
"""

BAD = """
<h2 id="there">Bad</h2>
<div style="width: 700px">a board that sticks out</div>
<div id="margin" style="width: 300px; overflow: hidden"><div style="width: 340px">three columns</div></div>
<p><img src="gone.png" alt="gone"> <img src="broken.png" alt="broken"> <img src="dot.png"></p>
<p><span class="math">\\(forgotten\\)</span> and $$raw$$ and \\(raw, too\\) and a lone $y^2$.</p>
<span class="math"><mjx-container><mjx-merror data-mjx-error="Missing }">{</mjx-merror></mjx-container></span>
<span class="math" id="red"><mjx-container><mjx-mtext style="color: red;">\\nosuch</mjx-mtext></mjx-container></span>
<p><a href="nowhere.html">dead</a> <a href="good.html#nothing">dead, too</a> <a href="#neither">and this</a></p>
<script>throw new Error("out of order")</script> <script src="https://cdn.example.org/mathjax.js"></script>
"""


def dot():
    """A picture of one black point."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"\0\0")), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    root = tmp_path_factory.mktemp("pages")
    (root / "good.html").write_text(HEAD.format("Good", GOOD))
    (root / "bad.html").write_text(HEAD.format("", BAD).replace(' lang="en"', ""))
    (root / "dot.png").write_bytes(dot())
    (root / "broken.png").write_bytes(dot()[:20])
    return root


@needs_browser
def test_every_fault_is_told_once_and_nothing_else(site):
    found = list(check_book.faults(site, "[bg]*d.html"))
    assert {page for page, _ in found} == {"bad.html"}
    words = [words for _, words in found]
    expected = [
        "the link nowhere.html leads to no file",
        "the link gone.png leads to no file",
        "the link good.html#nothing leads to no anchor",
        "the link #neither leads to no anchor",
        "the picture gone.png is missing or broken",
        "the picture broken.png is missing or broken",
        "the picture dot.png has no alternative text",
        r"a formula was not typeset: \(forgotten\)",
        "MathJax says: Missing }",
        r"MathJax does not know a command in: span#red (“\nosuch”)",
        "raw TeX in the text: $$raw$$ and \\(raw, too\\) and a lone $y^2$.",
        "the page does not say its language",
        "the page has no title",
        "at 1400 px: div#margin (“three columns”) hides 40 px of what it holds",
        "at 400 px: div#margin (“three columns”) hides 40 px of what it holds",
        "gone.png is missing",
        "it would fetch https://cdn.example.org/mathjax.js from elsewhere",
        "a script failed: Error: out of order",
    ]
    assert [fault for fault in expected if fault not in words] == []
    others = [fault for fault in words if fault not in expected]
    assert len(others) == 2 and others[0].startswith("at 400 px: the page is 7")
    assert others[1].startswith("at 400 px: div (“a board that sticks out”) ends 3")


@needs_browser
def test_names_of_files_are_no_alternative_text(site):
    (site / "alt.html").write_text(HEAD.format("Alt", '<img src="dot.png" alt="_images/dot.png">'))
    expected = [("alt.html", "the picture dot.png has no alternative text")]
    assert list(check_book.faults(site, "alt*")) == expected
    assert list(check_book.faults(site, "alt*", alt=False)) == []


INKED = """
<style>html[data-theme=dark] body {{ background: #14181e; }} body {{ background: white; }}</style>
<img class="dark-light" alt="squares" src="data:image/svg+xml,{}">
"""


@needs_browser
@pytest.mark.parametrize(
    "colour, where",
    [("black", "dark"), ("white", "light"), ("gray", ""), ("%233b6ea5", ""), ("%23222222", "dark")],
)
def test_ink_that_cannot_be_seen_in_a_theme_is_a_fault(site, colour, where):
    # a frame on the page, and two boxes with a white and a black edge
    svg = (
        "<svg xmlns='http://www.w3.org/2000/svg' width='300' height='100'><path d='M10 10h60v60h-60z' fill='none' "
        f"stroke='{colour}' stroke-width='6'/><rect x='100' y='10' width='80' height='80' fill='gray' stroke='white' stroke-width='2'/>"
        "<rect x='200' y='10' width='80' height='80' fill='gray' stroke='black' stroke-width='2'/></svg>"
    )
    (site / "ink.html").write_text(HEAD.format("Ink", INKED.format(svg.replace("#", "%23"))))
    words = [words for _, words in check_book.faults(site, "ink*")]
    assert len(words) == bool(where) and all(f"cannot be seen in the {where} theme" in one for one in words)


@needs_browser
def test_the_command_prints_a_line_for_each_fault(site):
    def run(*arguments):
        command = [sys.executable, str(ROOT / "tools" / "check_book.py"), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    good = run(site, "--only", "good*")
    assert (good.returncode, good.stdout, good.stderr) == (0, "", "no faults\n")
    bad = run(site, "--only", "bad*")
    assert bad.returncode == 1 and all(line.startswith("bad.html: ") for line in bad.stdout.splitlines())
    assert f"{len(bad.stdout.splitlines())} faults" in bad.stderr
    assert run(site, "--only", "none*").returncode == 2


def test_without_a_browser_it_says_what_to_install(site, monkeypatch, capsys):
    monkeypatch.setattr(browser, "BROWSERS", ())
    assert check_book.main([str(site), "--only", "good*"]) == 2
    assert "apt install chromium" in capsys.readouterr().err


def test_dead_links_need_no_browser(site):
    found = list(check_book.dead_links(site, [site / "good.html"]))
    assert found == []
    assert len(list(check_book.dead_links(site, [site / "bad.html"]))) == 4
