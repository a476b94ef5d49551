"""The tangler: what it makes, what it refuses, and that nothing is ever half done."""

import contextlib
import io
import itertools
import os
import re
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.books import NEW, NEWER, ONE_TANGLED, TWO, files, git, no_debris, put, texts
from tools import tangle
from tools.literate import writing
from tools.tangle import Book, Problem, TangleError, Tracer, WriteError, main, slug, watch

REPOSITORY = Path(__file__).resolve().parent.parent
PROGRAM = REPOSITORY / "tools" / "tangle.py"

pytestmark = pytest.mark.serial  # the tangler knows nothing of ranks


def problems(root):
    with pytest.raises(TangleError) as info:
        Book.load(root).tangle()
    assert str(info.value) == "\n".join(map(str, info.value.problems))
    return [str(problem) for problem in info.value.problems]


# ------------------------------------------------------------------------------------------------------------
# What is tangled


def test_a_book_becomes_files(tmp_path):
    put(tmp_path, c=TWO)
    assert texts(tmp_path) == {"pkg/one.py": ONE_TANGLED, "pkg/sub/two.py": "two = 2\n"}
    book = Book.load(tmp_path)
    assert book.roots == {"pkg/one.py": "one", "pkg/sub/two.py": "two"}
    assert {id: [block.line for block in blocks] for id, blocks in book.chunks.items()} == {
        "one": [3, 12],
        "two": [8],
        "do-the-work": [18],
    }
    assert book.used_in("do-the-work") == [book.chunks["one"][1]]
    assert book.used_in("one") == []
    assert book.files_of("do-the-work") == ["pkg/one.py"]
    assert book.packages == ["pkg"]


def test_chapters_are_read_in_the_order_of_their_paths(tmp_path):
    block = "```python {{#m{0}}}\n{1}\n```\n"
    put(
        tmp_path,
        **{
            "chapters/10-b": block.format("", "b = 1"),
            "chapters/02-a": block.format(' file="p/m.py"', "a = 1"),
            "index": block.format("", "z = 1"),
            "chapters/a/01": block.format("", "c = 1"),
            ".ipynb_checkpoints/x": block.format("", "no = 1"),
        },
    )
    assert texts(tmp_path) == {"p/m.py": "a = 1\n\nb = 1\n\nc = 1\n\nz = 1\n"}


@pytest.mark.parametrize(
    "before, after, blank",
    [
        ("import os", "import sys", 1),
        ("x = 1", "y = (\n    2,\n)", 1),
        ("x = 1", "def f():\n    pass", 2),
        ("x = 1", "# A remark.\n@wrap\nclass A:\n    pass", 2),
        ("async def f():\n    pass", "x = 1", 2),
        ("def f(\n    a,\n):\n    pass", "x = 1", 2),
        ("class A:\n    def f(self):\n        pass", "    def g(self):\n        pass", 1),
        ("    def g(self):\n        pass", "x = 1", 2),
        ("def f():\n    pass\n\n\nx = 1", "y = 1", 1),
        ("x = 1", "\tdef g(self):\n\t\tpass", 1),
        ("if x:\n    y = 1", "z = 1", 1),
    ],
)
def test_blank_lines_between_blocks(tmp_path, before, after, blank):
    (tmp_path / "book").mkdir()
    (tmp_path / "book/c.md").write_text(
        f'```python {{#m file="p/m.py"}}\n{before}\n\n```\n\n```python {{#m}}\n\n{after}\n```\n'
    )
    assert texts(tmp_path) == {"p/m.py": before + "\n" * (blank + 1) + after + "\n"}


def test_files_that_are_not_python_get_one_blank_line(tmp_path):
    put(
        tmp_path,
        c="""\
        ```toml {#project file="providers/x/pyproject.toml"}
        [project]
        # <<Names>>
        ```
        ```toml {#project}
        [tool.x]
        ```
        ```toml {#names}
        name = "x"
        ```
        ``` {#typed file="providers/x/px/py.typed"}
        ```
        """,
    )
    assert texts(tmp_path) == {
        "providers/x/px/py.typed": "",
        "providers/x/pyproject.toml": '[project]\n# Names\nname = "x"\n\n[tool.x]\n',
    }
    assert Book.load(tmp_path).packages == ["providers/x"]


def test_chunks_nest_repeat_and_are_appended_to(tmp_path):
    put(
        tmp_path,
        c="""\
        ```python {#m file="p/m.py"}
        if a:
            # <<Inner, part 1>>
        else:
          # <<inner: PART 1>>
        ```
        ```python {#inner-part-1}

        x = 1

        # <<Größe>>
        ```
        ```python {#größe}
        y = 1
            # z
        ```
        ```python {#inner-part-1}
        if x:

            w = 1
        ```
        """,
    )
    inner = ["x = 1", "", "# Größe", "y = 1", "    # z", "", "if x:", "", "    w = 1"]
    expected = [
        "if a:",
        "    # Inner, part 1",
        *("    " + line if line else "" for line in inner),
        "else:",
        "  # inner: PART 1",
        *("  " + line if line else "" for line in inner),
    ]
    assert texts(tmp_path) == {"p/m.py": "\n".join(expected) + "\n"}
    assert Book.load(tmp_path).tangled_at("book/c.md", 14) == [("p/m.py", 6), ("p/m.py", 17)]


def test_windows_line_ends_and_byte_order_mark(tmp_path):
    plain = put(tmp_path / "plain", c=TWO)
    text = textwrap.dedent(TWO).replace("\n", "\r\n").encode("utf-8-sig")
    windows = put(tmp_path / "windows", c=text)
    assert texts(windows) == texts(plain)
    one, other = Book.load(plain).tangle(), Book.load(windows).tangle()
    assert {path: made.lines for path, made in one.items()} == {
        path: made.lines for path, made in other.items()
    }
    assert all("\r" not in block.body for block in Book.load(windows).blocks)


def test_tabs_and_odd_characters_are_kept(tmp_path):
    body = "if x:\n\ty = '\t\x0c\u2028\x85\x1c'\n\tz = '\U0001f30c é'\n"
    put(tmp_path, c=f'```python {{#m file="p/m.py"}}\n{body}```\n')
    assert texts(tmp_path) == {"p/m.py": body}
    assert Book.load(tmp_path).where("p/m.py", 3) == ("book/c.md", 4)


def test_empty_books_chapters_and_blocks(tmp_path):
    put(
        tmp_path,
        a="",
        b="Only prose, no newline at the end",
        c='```python {#m file="p/m.py"}\n```',
        d="```python\n```",
    )
    book = Book.load(tmp_path)
    assert texts(tmp_path) == {"p/m.py": ""}
    assert book.chapters == ["book/a.md", "book/b.md", "book/c.md", "book/d.md"]
    assert [block.body for block in book.blocks] == ["", ""]
    assert main(["--root", str(tmp_path)]) == 0
    assert files(tmp_path) == {"p/m.py": ""}
    (tmp_path / "none/book").mkdir(parents=True)
    assert Book.load(tmp_path / "none").write().written == []


# ------------------------------------------------------------------------------------------------------------
# What a page is made of


PAGE = """\
    ---
    file_format: mystnb
    ---
    (label)=
    # Title

    ```python
    shown = 1
    ```

    ```{code-cell} python
    :tags: [hide-input]
    :name: x

    run = 1
    ```

    ```{code-cell} ipython3
    ---
    tags: [a]
    ---
    run = 2
    ```

    :::::{dropdown} Solution
    :open:

    ```pycon
    >>> 1 + 1
    2
    ```

    ::::{note}
    ~~~~python {#m file="p/m.py" .wide}
    deep = '```'
    ~~~~
    ````{tip} Title
    ```python {#m}
    deeper = 1
    ```
    ````
    ::::
    :::::

    ````markdown
    ```python {#not-ours}
    quoted = 1
    ```
    ````

    ```{math}
    :label: x
    a = b
    ```

    - a list

      ```python {#m}
      in_a_list = 1

      if in_a_list:
          pass
      ```

    > ```python {#m}
    > quoted = 1
    > ```

        ```python
        ```

    <!--
    ```python {#commented-out}
    ```
    -->

    % ```python {#also-commented-out}

    $$
    x
    $$ (eq-x)

    | a | b |
    |---|---|
    | 1 | 2 |

    A term
    :   what it means, and

        ```python
        in_a_definition = 1
        ```
    """


def test_fences_of_all_kinds_are_found(tmp_path):
    book = Book.load(put(tmp_path, c=PAGE))
    seen = [(b.line, b.depth, b.directive, b.language, b.arguments, b.id, b.file) for b in book.blocks]
    assert seen == [
        (7, 0, None, "python", "", None, None),
        (11, 0, "code-cell", "python", "python", None, None),
        (18, 0, "code-cell", "ipython3", "ipython3", None, None),
        (28, 1, None, "pycon", "", None, None),
        (34, 2, None, "python", "", "m", "p/m.py"),
        (38, 3, None, "python", "", "m", None),
        (45, 0, None, "markdown", "", None, None),
        (51, 0, "math", "", "", None, None),
        (58, 0, None, "python", "", "m", None),
        (65, 0, None, "python", "", "m", None),
        (90, 0, None, "python", "", None, None),
    ]
    lines = textwrap.dedent(PAGE).split("\n")
    for block in book.blocks:
        assert block.body_line == block.line + 1
        for number, text in enumerate(block.body.split("\n")[:-1], block.body_line):
            assert lines[number - 1].removeprefix("> ").strip() == text.strip()
        assert lines[block.end_line - 1].strip("> ")[:3] in ("```", "~~~")
    assert book.blocks[4].classes == ("wide",)
    cell, other = book.blocks[1:3]
    assert (cell.options, cell.code, cell.code_line) == (":tags: [hide-input]\n:name: x\n", "\nrun = 1\n", 14)
    assert (other.options, other.code, other.code_line) == ("---\ntags: [a]\n---\n", "run = 2\n", 22)
    assert book.tangle()["p/m.py"].text == (
        "deep = '```'\n\ndeeper = 1\n\nin_a_list = 1\n\nif in_a_list:\n    pass\n\nquoted = 1\n"
    )
    assert book.block_at("book/c.md", 35) is book.blocks[4]
    assert book.block_at("book/c.md", 5) is None


@pytest.mark.parametrize(
    "title, id",
    [
        ("Do it", "do-it"),
        ("  A -- B!  ", "a-b"),
        ("Größe Ω²", "größe-ω²"),
        ("x_1", "x-1"),
        ("???", ""),
        ("漢字 2", "漢字-2"),
    ],
)
def test_slug(title, id):
    assert slug(title) == id


@settings(max_examples=40, deadline=None)
@given(st.text())
def test_slug_of_a_slug_is_itself(title):
    assert slug(slug(title)) == slug(title)
    assert slug(title) == re.sub(r"[\W_]+", "-", title.lower()).strip("-")


# ------------------------------------------------------------------------------------------------------------
# Random books, against a small model of what they should become


@dataclass
class Piece:
    """A block as the model sees it: a kind, and lines that are text, or (indent, title) for a reference."""

    id: str
    kind: str
    lines: list
    file: str = ""
    place: tuple = ()
    titles: dict = field(default_factory=dict)


WORDS = st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="'\\"), max_size=6)
TITLE_WORD = st.sampled_from(
    ["Walk", "the", "Tape", "Ψ", "größe", "2nd", "back–wards", "L²", "漢字", "a_b", "d'un"]
)
INDENTS = st.sampled_from(["", "    ", "\t", "  "])


@st.composite
def books(draw):  # noqa: C901
    """Pieces in reading order."""
    chunk_titles, seen = [], set()
    for words in draw(st.lists(st.lists(TITLE_WORD, min_size=1, max_size=3), max_size=6)):
        title = " ".join(words)
        if slug(title) not in seen and not slug(title).startswith("file-"):
            seen.add(slug(title))
            chunk_titles.append(title)
    count = 0

    def line(indent, statement="v{} = '{}'"):
        nonlocal count
        count += 1
        return indent + statement.format(count, draw(WORDS))

    def some(indent, titles, least=1):
        lines = [line(indent)] if least else []
        for _ in range(draw(st.integers(0, 3))):
            what = draw(
                st.sampled_from(["line", "deep", "blank", "space", "fence"] + ["reference"] * bool(titles))
            )
            lines.append(
                {
                    "line": lambda: line(indent),
                    "deep": lambda: line(indent + draw(INDENTS)),
                    "blank": lambda: "",
                    "space": lambda: " \t ",
                    "fence": lambda: indent + draw(st.sampled_from(["# ```", "# ::::", "x = '''~~~~'''"])),
                    "reference": lambda: (indent + draw(INDENTS), draw(st.sampled_from(titles))),
                }[what]()
            )
        return lines

    def padded(lines):
        return [""] * draw(st.integers(0, 2)) + lines + [""] * draw(st.integers(0, 2))

    pieces = []
    for n in range(draw(st.integers(0, 3))):
        path = f"pkg{'/sub' * (n % 2)}/m{n}.py"
        for k in range(draw(st.integers(1, 4))):
            kind = draw(
                st.sampled_from(["statements", "definition", "inside"] if k else ["statements", "definition"])
            )
            if kind == "statements":
                lines = [line(""), *some("", chunk_titles)]
            elif kind == "definition":
                lines = ["# A remark."] * draw(st.integers(0, 1)) + [line("", "def f{}(x='{}'):")]
                lines += [line("    "), *some("    ", chunk_titles)]
            else:
                lines = [line("    "), *some("    ", chunk_titles)]
            pieces.append(Piece(f"file-{n}", kind, padded(lines), file=path if k == 0 else ""))
    if not pieces:
        return pieces
    for n, title in enumerate(chunk_titles):  # a chunk refers to later ones only: no circles
        if not any(isinstance(text, tuple) and text[1] == title for piece in pieces for text in piece.lines):
            pieces[-1].lines.append(("    ", title))
        for _ in range(draw(st.integers(1, 2))):
            at = draw(st.integers(0, len(pieces)))
            pieces.insert(at, Piece(slug(title), "chunk", padded(some("", chunk_titles[n + 1 :]))))
    first = {}
    for piece in pieces:  # a file begins with the block that names it
        first.setdefault(piece.id, piece)
    return pieces


def model(pieces):
    """What the files should be, written as directly as can be."""

    def body(piece):
        out = []
        for text in piece.lines:
            if isinstance(text, tuple):
                indent, title = text
                inner = "\n\n".join(
                    part for other in pieces if other.id == slug(title) and (part := body(other))
                )
                out.append(f"{indent}# {title}")
                out += [indent + row if row else "" for row in inner.split("\n")] if inner else []
            else:
                out.append(text if text.strip() else "")
        return "\n".join(out).strip("\n")

    made = {}
    for piece in pieces:
        if not piece.file:
            continue
        text = kind = ""
        for part in (other for other in pieces if other.id == piece.id):
            wide = part.kind == "definition" or (part.kind == "statements" and kind != "statements")
            text += ("\n\n\n" if wide else "\n\n") if text else ""
            text += body(part)
            kind = part.kind
        made[piece.file] = text + "\n"
    return made


def run_of(character, text):
    return max((len(found) for found in re.findall(re.escape(character) + "+", text)), default=0)


@st.composite
def pages(draw):
    """Pieces, and chapters that carry them in some Markdown dress."""
    pieces = draw(books())
    chapters = {}
    cuts = sorted(draw(st.lists(st.integers(0, len(pieces)), max_size=2)))
    for n, (start, stop) in enumerate(itertools.pairwise([0, *cuts, len(pieces)])):
        parts = ["---\nfile_format: mystnb\n---\n"] * draw(st.integers(0, 1))
        for piece in pieces[start:stop]:
            body = "".join(
                f"{text[0]}# <<{text[1]}>>\n" if isinstance(text, tuple) else text + "\n"
                for text in piece.lines
            )
            mark = draw(st.sampled_from("`~"))
            fence = mark * max(3, run_of(mark, body) + 1)
            name = f' file="{piece.file}"' if piece.file else ""
            text = f"{fence}python {{#{piece.id}{name}}}\n{body}{fence}\n"
            for _ in range(draw(st.integers(0, 2))):
                mark = draw(st.sampled_from(":`~"))
                fence = mark * max(3, run_of(mark, text) + 1)
                option = ":class: wide\n\n" * draw(st.integers(0, 1))
                name = draw(st.sampled_from(["note", "dropdown", "admonition"]))
                text = f"{fence}{{{name}}} A title\n{option}{text}{fence}\n"
            dress = draw(st.sampled_from(["plain", "plain", "list", "quote"]))
            if dress == "quote":
                text = "".join(f"> {row}\n" for row in text.split("\n")[:-1])
            elif dress == "list":
                text = "1. An item:\n\n" + "".join(
                    f"   {row}\n" if row else "\n" for row in text.split("\n")[:-1]
                )
            parts.append(text)
            parts.append(
                draw(
                    st.sampled_from(
                        [
                            "Some prose.\n",
                            "```python\nillustration = 1\n```\n",
                            "## A title\n",
                            "$$\na = b\n$$ (eq)\n",
                            "````text\n```python {#no}\n```\n````\n",
                            "% remark\n",
                        ]
                    )
                )
            )
        text = "\n".join(parts)
        data = (text.replace("\n", "\r\n") if draw(st.booleans()) else text).encode()
        chapters[f"book/c{n}.md"] = (b"\xef\xbb\xbf" if draw(st.booleans()) else b"") + data
    return pieces, chapters


MARKS = """\
# Marks

```python {#a file="p/a.py"}
x = 1
```

```python
not_marked = 1
```

```python {.illustration}
marked = 1
```

```Python3 {.wide}
neither = 1
```

```pycon
>>> 1
1
```

```sh
make
```

```
who knows
```

{fine}text

    by indentation

````{note}
```python
within = 1
```
````

```{code-block} python
not_run = 1
```

```{code-block} toml
fine = 1
```

```{code-cell} python
run = 1
```
"""


def test_code_must_say_what_it_is(tmp_path, capsys, monkeypatch):
    (tmp_path / "book").mkdir()
    page = tmp_path / "book" / "marks.md"
    page.write_text(MARKS)
    book = Book.load(tmp_path)
    book.write()
    found = [(problem.line, problem.message[:19]) for problem in book.check_marks()]
    lines = MARKS.splitlines()
    wanted = {
        "not_marked = 1": "a fence that is nei",
        "neither = 1": "a fence that is nei",
        "who knows": "a fence without a l",
        "within = 1": "a fence that is nei",
        "not_run = 1": "{code-block} is nei",
    }
    expected = [(lines.index(line), message) for line, message in wanted.items()]
    assert found == sorted([*expected, (lines.index("    by indentation") + 1, "code by indentation")])
    assert main(["--root", str(tmp_path), "--check-marks"]) == 2
    assert f"book/marks.md:{lines.index('not_marked = 1')}: a fence" in capsys.readouterr().err
    for switch, status in [(False, 0), (True, 2)]:
        monkeypatch.setattr(tangle, "MARKS_IN_CHECK", switch)
        assert main(["--root", str(tmp_path), "--check"]) == status
    page.write_text(MARKS.replace("{#a file", "{#a .illustration file"))
    assert "is part of the program" in str(Book.load(tmp_path).problems[0])


def test_code_of_this_book_says_what_it_is():
    problems = Book.load(Path(tangle.__file__).parent.parent).check_marks()
    assert not problems, "\n".join(map(str, problems))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(pages())
def test_random_books(tmp_path_factory, page):
    pieces, chapters = page
    root = tmp_path_factory.mktemp("book")
    (root / "book").mkdir()
    for name, data in chapters.items():
        (root / name).write_bytes(data)
    book = Book.load(root)
    made = book.tangle()
    assert {path: tangled.text for path, tangled in made.items()} == model(pieces)

    source = {
        name: data.decode("utf-8-sig").replace("\r\n", "\n").split("\n") for name, data in chapters.items()
    }
    for path, (text, origins) in made.items():  # the line map, line by line
        rows = text.split("\n")[:-1]
        assert len(rows) == len(origins)
        for number, (row, origin) in enumerate(zip(rows, origins, strict=True), 1):
            if origin is None:
                assert row == ""
                continue
            there = source[origin.chapter][origin.line - 1].lstrip("> \t")
            assert (
                there.strip() == re.sub(r"^\s*# (.*)$", r"# <<\1>>", row).strip()
                or there.strip() == row.strip()
            )
            assert book.where(path, number) == origin
            assert (path, number) in book.tangled_at(*origin)
        shown = [
            (row, origin) for row, origin in zip(rows, origins, strict=True) if row.strip().startswith("v")
        ]
        for row, origin in shown:  # the statements are all different: no other line will do
            name = row.strip().split(" ")[0] + " = "
            here = [
                (c, n)
                for c, page in source.items()
                for n, line in enumerate(page, 1)
                if line.lstrip("> \t").startswith(name)
            ]
            assert here == [origin]

    again = Book.load(root)  # the same once more, and written only once
    assert again.tangle() == made
    assert again.write().written == sorted(made)
    assert again.write() == ([], [], [])
    assert again.check() == []
    assert files(root) == {path: tangled.text for path, tangled in made.items()}


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.sampled_from(
            [
                "```",
                "````",
                "~~~",
                ":::",
                "::::",
                "python",
                " {#a",
                "{#a}",
                " file=",
                '"p/a.py"',
                "}",
                "{note}",
                "{code-cell}",
                "\n",
                "\n",
                "\n",
                "> ",
                "- ",
                "    ",
                "\t",
                "# <<A>>",
                "# <<",
                "---",
                "$$",
                "\r",
                "é",
                "<!--",
                "-->",
                "|",
                '"',
                "=",
                "+++",
                "%",
                "(x)=",
                ".c",
            ]
        ),
        max_size=40,
    )
)
def test_any_page_is_read_or_refused_with_places(tmp_path_factory, tokens):
    text = "".join(tokens)
    root = put(tmp_path_factory.mktemp("any"), c=text.encode())
    book = Book.load(root)
    height = text.replace("\r", "\n").count("\n") + 1
    assert all(problem.chapter == "book/c.md" and 1 <= problem.line <= height for problem in book.problems)
    assert all(1 <= block.line <= height for block in book.blocks)
    with contextlib.suppress(TangleError):
        for made in book.tangle().values():
            assert made.text == "" or (made.text.endswith("\n") and not made.text.endswith("\n\n"))


# ------------------------------------------------------------------------------------------------------------
# Errors of the book


ROOT = '```python {#m file="p/m.py"}\nx = 1\n```\n'
ADVICE = 'attributes stand in braces, {#name file="..."}'
INSIDE = "the fence {!r} stands within the one opened at line {}: close that first, or make it longer"


@pytest.mark.parametrize(
    "page, expected",
    [
        (
            ROOT
            + "```python {#m}\n# <<Wlk the tape>>\n# <<Walk the tape>>\n```\n"
            + "```python {#walk-the-tape}\n```\n",
            ["5: no chunk #wlk-the-tape for the reference <<Wlk the tape>>; did you mean #walk-the-tape?"],
        ),
        (
            ROOT + "```python {#m}\n    # <<Nothing like it>>\n```\n",
            ["5: no chunk #nothing-like-it for the reference <<Nothing like it>>"],
        ),
        (
            ROOT + "```python {#unused}\n```\n```python {#mm}\n```\n",
            [
                "4: no file includes the chunk #unused",
                "6: no file includes the chunk #mm; did you mean to append to #m?",
            ],
        ),
        (
            ROOT
            + "```python {#m}\n# <<A>>\n```\n```python {#a}\n# <<B>>\n```\n"
            + "```python {#b}\n\n  # <<A>>\n```\n",
            ["12: the chunk includes itself: #a -> #b -> #a"],
        ),
        (ROOT + "```python {#a}\n# <<A>>\n```\n", ["5: the chunk includes itself: #a -> #a"]),
        (
            ROOT + "```python {#m}\n# <<M>>\n```\n",
            ["5: <<M>> is not a chunk but the file 'p/m.py'", "5: the chunk includes itself: #m -> #m"],
        ),
        (ROOT + '```python {#n file="p/m.py"}\n```\n', ["4: 'p/m.py' is made by #m already, at book/c.md:1"]),
        (
            ROOT + '```python {#m file="p/n.py"}\n```\n',
            ["4: #m cannot be 'p/n.py': it is 'p/m.py' since book/c.md:1"],
        ),
        (ROOT + ROOT, ["4: #m names its file already at book/c.md:1; append with {#m} alone"]),
        (
            "```python {#m}\n```\n" + ROOT,
            ["3: #m has a block before this one, which names its file: at book/c.md:1"],
        ),
        (
            ROOT + '```python {#n file="p/m.py/n.py"}\n```\n',
            ["4: 'p/m.py/n.py' needs a folder where 'p/m.py' is a file, at book/c.md:1"],
        ),
        (
            '```python {#m fle="p/m.py"}\n```\n',
            ["1: no file includes the chunk #m", "1: unknown attribute 'fle'; did you mean 'file'?"],
        ),
        (
            '```python {#m file="p/m.py" width="3"}\n```\n',
            ["1: unknown attribute 'width'; the only one is 'file'"],
        ),
        ('```python {#m file="p/m.py}\n```\n', ["1: the value of 'file' has no closing quote \""]),
        (
            "```python {#m file=p/m.py}\n```\n",
            ["1: the value of 'file' must stand in quotes: file=\"p/m.py\""],
        ),
        ('```python {#m file="p/m.py" file="p/m.py"}\n```\n', ["1: attribute 'file' is given twice"]),
        ('```python {#m file="p/m.py"\n```\n', ["1: the attributes have no closing brace '}'"]),
        ('```python {#m file="p/m.py"} x\n```\n', ["1: unexpected 'x' after the attributes"]),
        ('```python x {#m file="p/m.py"}\n```\n', ["1: unexpected 'x' between language and attributes"]),
        ('```python {#m #n file="p/m.py"}\n```\n', ["1: a second id '#n': a block has one"]),
        ('```python {# file="p/m.py"}\n```\n', ["1: the id is empty: write {#name-of-the-block}"]),
        (
            '```python {#m file="p/m.py" w}\n```\n',
            ["1: cannot make sense of 'w': expected #id, .class or key=\"value\""],
        ),
        (
            '```python {file="p/m.py"}\n```\n',
            ["1: the block that begins 'p/m.py' has no id: write {#name file=\"p/m.py\"}"],
        ),
        (
            '```python {#The_M file="p/m.py"}\n```\n',
            ["1: bad id 'The_M': lower-case letters and digits, joined by single hyphens: write #the-m"],
        ),
        (
            '```python {#m file="/etc/m.py"}\n```\n',
            ["1: file '/etc/m.py' is absolute: give it relative to the root of the repository"],
        ),
        (
            '```python {#m file="C:/m.py"}\n```\n',
            ["1: file 'C:/m.py' is absolute: give it relative to the root of the repository"],
        ),
        ('```python {#m file="p/../../m.py"}\n```\n', ["1: file 'p/../../m.py' must not contain '..'"]),
        ('```python {#m file="p\\m.py"}\n```\n', ["1: file 'p\\\\m.py': write it with forward slashes"]),
        (
            '```python {#m file="p//m.py"}\n```\n',
            ["1: file 'p//m.py' is not a plain path such as 'package/module.py'"],
        ),
        ('```python {#m file="."}\n```\n', ["1: file '.' is not a plain path such as 'package/module.py'"]),
        ('```python {#m file=""}\n```\n', ["1: the file has no name"]),
        (
            '```python {#m file="book/c.md"}\n```\n',
            ["1: file 'book/c.md': a chapter cannot write into book/"],
        ),
        ("prose\n\n```python\nx\n", ["3: the fence ``` is not closed"]),
        ("- item\n\n  ```python\n  x\n\nprose\n", ["3: the fence ``` is not closed"]),
        (
            ":::{note}\n```python\nx\n:::\n",
            ["2: the fence ``` is not closed; an outer fence must be longer than those within it"],
        ),
        (
            ":::{note}\n:::{tip}\n:::\n:::\n",
            [
                "2: the fence ::: is not closed; an outer fence must be longer than those within it",
                "4: the fence ::: is not closed; an outer fence must be longer than those within it",
            ],
        ),
        (":::python {#m}\n:::\n", ["1: canonical code stands between backticks, not between colons"]),
        (
            ROOT + "```python {#m}\n# <<A>\n#<<A>>\n# <<!>>\n```\n",
            [
                "5: '# <<A>' is not a reference: write '# <<Title of the chunk>>'",
                "6: '#<<A>>' is not a reference: write '# <<Title of the chunk>>'",
                "7: the reference '# <<!>>' names no chunk: its title has no letter or digit",
            ],
        ),
        *(
            (f"{ROOT}```{info}\nlost = 1\n```\n", [f"4: cannot make sense of {said!r}: {ADVICE}"])
            for info, said in [
                ('python #z file="p/z.py"', '#z file="p/z.py"'),
                ("python (#z)", "(#z)"),
                ("python z", "z"),
                ("python z {.wide}", "z {.wide}"),
                ('python file="p/z.py"', 'file="p/z.py"'),
                ("Python3 <#z>", "<#z>"),
                ("pycon later", "later"),
                ("toml #z", "#z"),
                ('toml file = "p/z.toml"', 'file = "p/z.toml"'),
                ("#z", "#z"),
                ('file="p/z.py"', 'file="p/z.py"'),
            ]
        ),
        (
            "```{python} #z\nlost = 1\n```\n",
            ["1: a directive has no attributes such as '#z': canonical code is a plain fence"],
        ),
        (
            ':::{code-block} python {#z file="p/z.py"}\nlost = 1\n:::\n',
            [
                "1: a directive has no attributes such as 'python {#z file=\"p/z.py\"}': "
                "canonical code is a plain fence"
            ],
        ),
        (":::python #m\n:::\n", ["1: canonical code stands between backticks, not between colons"]),
        (
            '```python {#m file="p/m.py"}\nx = 1\n```python {#m}\ny = 1\n```\n',
            ["3: " + INSIDE.format("```python {#m}", 1)],
        ),
        (
            ROOT + "~~~\n~~~~ text\n~~~~\n~~~\ny\n~~~\n",
            ["5: " + INSIDE.format("~~~~ text", 4)],
        ),
        (
            "- ```python\n  x = 1\n  ```.\n  ```\n",
            ["3: " + INSIDE.format("```.", 1)],
        ),
        (
            "```{code-cell} python\nx = 1\n```{code-cell} python\n```\n",
            ["3: " + INSIDE.format("```{code-cell} python", 1)],
        ),
        (b"a\n\n\xff", ["3: not UTF-8: invalid start byte b'\\xff'"]),
        (b"a\n\0", ["2: a NUL character"]),
    ],
)
def test_errors_name_the_chapter_line(tmp_path, page, expected):
    put(tmp_path, c=page if isinstance(page, bytes) else page.encode())
    assert problems(tmp_path) == ["book/c.md:" + line for line in expected]


MISTYPED = """\
python #z file="p/z.py"|python (#z file="p/z.py")|python (#z)|python [#z]|python <#z>|python file="p/z.py"|python z
python {#z file=p/z.py}|python {#z file:"p/z.py"}|python {#z file "p/z.py"}|python {# z}|python {#z}{file="p/z.py"}
python {z}|python {id="z"}|python {#z File="p/z.py"}|python {#z, file="p/z.py"}|python {{#z}}|python {#z|python #z}
python#z|python;#z|python(#z)|py-{#z}|Python #z|python \u201c#z\u201d|python {\uff03z}|python: {#z}|{python} #z|{python} z
toml #z|toml id=z|toml file: p/z.py|toml file p/z.py|toml {file="p/z.toml"}|text (#z)|#z file="p/z.py"|file="p/z.py"
<<z>>|python <<z>>|python # <<z>>|pyhton #z|{code-block} python {#z}|{python #z}|(#z file="p/z.py")\
"""


@pytest.mark.parametrize("info", MISTYPED.replace("\n", "|").split("|"))
def test_code_behind_a_mistyped_info_string_is_not_lost(tmp_path, info):
    put(tmp_path, c=f'# T\n\n```python {{#a file="p/a.py"}}\na = 1\n```\n\n```{info}\nz = 1\n```\n')
    assert any(problem.startswith("book/c.md:7: ") for problem in problems(tmp_path))


FENCE = '```python {#z file="p/z.py"}\nz = 1\n```\n'


@pytest.mark.parametrize(
    "page, line",
    [
        ("```text\n" + FENCE + "```\n", 2),
        ("```{code-cell} python\n" + FENCE + "```\n", 2),
        ("~~~text\n" + FENCE.replace("`", "~") + "~~~\n", 2),
        ("text\n\n" + textwrap.indent(FENCE, "    "), 3),
        ("text\n\n" + textwrap.indent(FENCE, "\t"), 3),
        ("- item\n\n" + textwrap.indent(FENCE, "      "), 3),
        ("<div>\n" + FENCE + "</div>\n", 2),
        ("<details>\n<summary>x</summary>\n" + FENCE + "</details>\n", 3),
        ("<pre>\n" + FENCE + "</pre>\n", 2),
        ("$$\n" + FENCE + "$$\n", 2),
        ("<!-- begins\n\n" + FENCE, 1),
        ("---\na: |\n" + textwrap.indent(FENCE, "  ") + "---\n", 3),
        ("[^1]: note\n" + textwrap.indent(FENCE, "    "), 2),
        (FENCE.replace("```", "``"), 1),
        (FENCE.replace("```", "'''"), 1),
        (FENCE.replace("```", "\u00b4\u00b4\u00b4"), 1),
        ("::::{note}\n" + textwrap.indent(FENCE, "    ") + "::::\n", 2),
    ],
)
def test_a_block_that_markdown_does_not_see_is_not_lost(tmp_path, page, line):
    put(tmp_path, c=page)
    assert any(problem.startswith(f"book/c.md:{line}: ") for problem in problems(tmp_path))


@pytest.mark.parametrize(
    "page",
    [
        "````text\n" + FENCE + "````\n",
        "~~~markdown\n" + FENCE + "~~~\n",
        "<!--\n" + FENCE + "-->\n",
        "% " + FENCE.replace("\n", "\n% "),
        'A fence begins with ``python {#z}`` or\n`` ```python {#z file="p/z.py"} ``.\n',
        "```text c#\n```\n```c#\n```\n```text see issue#12\n```\n",
    ],
)
def test_what_is_shown_or_commented_out_is_no_block(tmp_path, page):
    assert texts(put(tmp_path, c=page)) == {}


def test_all_errors_at_once_in_order(tmp_path, capsys):
    put(
        tmp_path,
        b="```python {#x y}\n# <<Nobody>>\n```\n",
        a='text\n\n```python {#m file="../m.py"}\n',
        c=b"\xff",
    )
    assert main(["--root", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines() == [
        "book/a.md:3: file '../m.py' must not contain '..'",
        "book/a.md:3: the fence ``` is not closed",
        "book/b.md:1: cannot make sense of 'y': expected #id, .class or key=\"value\"",
        "book/b.md:1: no file includes the chunk #x",
        "book/b.md:2: no chunk #nobody for the reference <<Nobody>>",
        "book/c.md:1: not UTF-8: invalid start byte b'\\xff'",
    ]
    assert files(tmp_path) == {}
    for command in (["--check"], ["list"], ["where", "p/m.py:1"]):
        assert main(["--root", str(tmp_path), *command]) == 2
        assert capsys.readouterr().err == err


def test_a_root_without_a_book(tmp_path):
    assert Book.load(tmp_path).problems == [
        Problem("book", 1, f"there is no such folder in {tmp_path.resolve()}")
    ]


def test_attributes_that_mean_nothing_to_us_pass(tmp_path):
    put(
        tmp_path,
        c="```text some {words}\n```\n```{python}\n```\n```python {.numbered}\n```\n``` \n```\n"
        "```{dropdown} Exercise #2, file=x\n```\n````md\n```python {#a}\n    ````python\n````\n",
    )
    book = Book.load(tmp_path)
    assert book.tangle() == {}
    assert [block.classes for block in book.blocks] == [(), ("numbered",), (), ()]


# ------------------------------------------------------------------------------------------------------------
# Writing


def test_only_what_changed_is_touched(tmp_path, capsys):
    put(tmp_path, c=TWO)
    assert main(["--root", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "wrote pkg/one.py\nwrote pkg/sub/two.py\n"
    assert files(tmp_path)["pkg/one.py"] == ONE_TANGLED
    for path in ("pkg/one.py", "pkg/sub/two.py"):
        os.utime(tmp_path / path, (1, 1))
    put(tmp_path, c=TWO.replace("two = 2", "two = 3"))
    os.chmod(tmp_path / "pkg/sub/two.py", 0o755)
    assert main(["--root", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "wrote pkg/sub/two.py\n"
    assert (tmp_path / "pkg/one.py").stat().st_mtime == 1
    assert (tmp_path / "pkg/sub/two.py").stat().st_mtime != 1
    assert (tmp_path / "pkg/sub/two.py").stat().st_mode & 0o777 == 0o755
    assert main(["--root", str(tmp_path)]) == 0
    assert capsys.readouterr().out == ""
    assert no_debris(tmp_path)


def test_check_writes_nothing_and_shows_drift(tmp_path, capsys):
    put(tmp_path, c=TWO)
    check = ["--root", str(tmp_path), "--check"]
    assert main(check) == 1
    out, err = capsys.readouterr()
    assert "+++ pkg/one.py (book)\n" in out and "+    x += 1\n" in out and "pkg/sub/two.py is missing" in err
    assert files(tmp_path) == {} and not (tmp_path / ".tangle").exists()

    Book.load(tmp_path).write()
    assert main(check) == 0
    assert capsys.readouterr() == ("", "")

    one = tmp_path / "pkg/one.py"
    one.write_text(ONE_TANGLED.replace("x += 1", "x += 2"))
    (tmp_path / "pkg/new.py").write_text("new = 1\n")
    for kept in (
        "pkg/py.typed",
        "pkg/build/lib/b.py",
        "pkg/x.egg-info/c.py",
        "pkg/__pycache__/d.py",
        "tests/e.py",
        "f.py",
    ):
        (tmp_path / kept).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / kept).write_text("")
    before = files(tmp_path)
    assert main(check) == 1
    out, err = capsys.readouterr()
    assert "-    x += 2\n+    x += 1\n" in out and " book/c.md:" in out and "-new = 1\n" in out
    assert err.splitlines()[:2] == ["pkg/new.py is made by no chapter", "pkg/one.py differs from the book"]
    assert files(tmp_path) == before
    one.write_bytes(ONE_TANGLED.encode()[:-1])
    (tmp_path / "pkg/new.py").unlink()
    assert main(check) == 1
    assert "(no newline at the end)" in capsys.readouterr().out
    one.write_bytes(b"\xff\n")
    assert main(check) == 1
    assert "-\\xff\n" in capsys.readouterr().out


def test_an_edit_by_hand_is_refused_then_forced(tmp_path, capsys):
    put(tmp_path, c=TWO)
    Book.load(tmp_path).write()
    edited = ONE_TANGLED.replace("x += 1", "x += 2") + "more = 1\n"
    (tmp_path / "pkg/one.py").write_text(edited)
    put(
        tmp_path,
        c=TWO.replace("two = 2", "two = 3").replace(
            "    # A chapter\n", "    # A chapter\n\n    More prose.\n"
        ),
    )
    assert main(["--root", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[:3] == [
        "pkg/one.py was edited by hand, and tangling would overwrite that:",
        "    line 7 changed: book/c.md:21, in the block #do-the-work that begins at line 20",
        "    line 9 added: book/c.md:17, in the block #one that begins at line 14",
    ]
    assert "--force" in err
    assert files(tmp_path) == {"pkg/one.py": edited, "pkg/sub/two.py": "two = 2\n"}  # two.py waits as well
    assert main(["--root", str(tmp_path), "--force"]) == 0
    assert files(tmp_path) == {"pkg/one.py": ONE_TANGLED, "pkg/sub/two.py": "two = 3\n"}


def test_an_edit_that_the_chapter_has_too_is_no_edit(tmp_path):
    put(tmp_path, c=TWO)
    Book.load(tmp_path).write()
    (tmp_path / "pkg/one.py").write_text(ONE_TANGLED.replace("x += 1", "x += 2"))
    put(tmp_path, c=TWO.replace("x += 1", "x += 2"))
    assert Book.load(tmp_path).write().written == []
    put(tmp_path, c=TWO)  # and from now on this is what was tangled
    assert Book.load(tmp_path).write().written == ["pkg/one.py"]


def test_a_removed_line_is_reported(tmp_path):
    put(tmp_path, c=TWO)
    Book.load(tmp_path).write()
    (tmp_path / "pkg/one.py").write_text(ONE_TANGLED.replace("import os\n", ""))
    put(tmp_path, c=TWO.replace("x += 1", "x += 2"))
    with pytest.raises(
        WriteError, match=r"removed before line 2: book/c\.md:5, in the block #one that begins at line 3"
    ):
        Book.load(tmp_path).write()


def test_an_unknown_file_in_the_way_is_refused(tmp_path):
    put(tmp_path, c=TWO)
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg/one.py").write_text("mine = 1\n")
    with pytest.raises(WriteError, match="pkg/one.py was edited by hand"):
        Book.load(tmp_path).write()
    assert files(tmp_path) == {"pkg/one.py": "mine = 1\n"}


def test_windows_line_ends_in_the_package_are_not_an_edit(tmp_path):
    put(tmp_path, c=TWO)
    Book.load(tmp_path).write()
    (tmp_path / "pkg/one.py").write_bytes(ONE_TANGLED.replace("\n", "\r\n").encode())
    assert Book.load(tmp_path).write().written == ["pkg/one.py"]
    assert files(tmp_path)["pkg/one.py"] == ONE_TANGLED


def test_a_committed_file_counts_as_tangled(tmp_path):
    put(tmp_path, c=TWO)
    Book.load(tmp_path).write()
    (tmp_path / ".gitignore").write_text(".tangle/\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "first")
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", ".", "clone")
    assert not (clone / ".tangle").exists()
    put(clone, c=TWO.replace("x += 1", "x += 2"))
    (clone / "pkg/sub/two.py").write_text("two = 'mine'\n")
    put(clone, d="```python {#two}\nmore = 2\n```\n")
    with pytest.raises(WriteError) as info:
        Book.load(clone).write()
    assert info.value.messages[0].startswith("pkg/sub/two.py was edited") and "pkg/one.py" not in str(
        info.value
    )
    assert "    line 1 changed: book/c.md:9, in the block #two that begins at line 8" in info.value.messages
    git(clone, "checkout", "--", "pkg/sub/two.py")
    assert Book.load(clone).write().written == ["pkg/one.py", "pkg/sub/two.py"]
    git(clone, "add", "-A")
    git(clone, "commit", "-qm", "second")
    git(clone, "checkout", "-q", "HEAD~1")  # what git put there is nobody's edit
    put(clone, c=TWO.replace("x += 1", "x += 3"))
    assert Book.load(clone).write().written == ["pkg/one.py"]


def test_an_edit_that_was_committed_is_still_an_edit(tmp_path):
    """In a fresh clone a file counts as tangled if the committed chapters make it, not because it is committed."""
    put(tmp_path, c=TWO)
    Book.load(tmp_path).write()
    (tmp_path / ".gitignore").write_text(".tangle/\n")
    (tmp_path / "pkg/one.py").write_text(ONE_TANGLED + "mine = 1\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "first")
    git(tmp_path, "clone", "-q", ".", "clone")
    for root in (tmp_path, tmp_path / "clone"):
        put(root, c=NEW)
        with pytest.raises(WriteError, match="pkg/one.py was edited by hand") as info:
            Book.load(root).write()
        assert (
            "    line 9 added: book/c.md:15, in the block #one that begins at line 12" in info.value.messages
        )
        assert "pkg/sub/two.py" not in str(info.value)


def test_files_that_no_chapter_makes_any_more(tmp_path, capsys):
    put(tmp_path, c=TWO)
    Book.load(tmp_path).write()
    put(tmp_path, c=TWO.replace("pkg/sub/two.py", "pkg/too.py"))
    assert main(["--root", str(tmp_path)]) == 0
    assert (
        capsys.readouterr().out == "wrote pkg/too.py\nremoved pkg/sub/two.py: no chapter makes it any more\n"
    )
    assert sorted(files(tmp_path)) == ["pkg/one.py", "pkg/too.py"] and not (tmp_path / "pkg/sub").exists()

    (tmp_path / "pkg/too.py").write_text("mine = 1\n")
    put(tmp_path, c=TWO)
    for _ in range(2):
        assert main(["--root", str(tmp_path)]) == 0
        assert (
            "pkg/too.py is made by no chapter any more, but was edited by hand: it stays"
            in capsys.readouterr().err
        )
    assert files(tmp_path)["pkg/too.py"] == "mine = 1\n"
    assert main(["--root", str(tmp_path), "--check"]) == 1


def test_a_file_that_git_knows_but_no_chapter_makes_stays(tmp_path, capsys):
    put(tmp_path, c=TWO)
    Book.load(tmp_path).write()
    (tmp_path / "pkg/old.py").write_text("old = 1\n")
    assert main(["--root", str(tmp_path)]) == 0
    assert capsys.readouterr().err == "note: pkg/old.py is made by no chapter\n"
    assert (tmp_path / "pkg/old.py").exists()


@pytest.mark.parametrize("block", ["read-only", "folder in the way", "file in the way", "link out"])
def test_unwritable_targets_leave_everything_as_it_was(tmp_path, capsys, block):
    root = put(tmp_path / "root", c=TWO)
    (root / "pkg").mkdir()
    (root / "pkg/one.py").write_text("")
    if block == "read-only":
        (root / "pkg/sub").mkdir()
        (root / "pkg/sub/two.py").write_text("")
        (root / "pkg/sub/two.py").chmod(0o444)
    elif block == "folder in the way":
        (root / "pkg/sub/two.py").mkdir(parents=True)
    elif block == "file in the way":
        (root / "pkg/sub").write_text("")
    else:
        (tmp_path / "elsewhere").mkdir()
        (root / "pkg/sub").symlink_to(tmp_path / "elsewhere")
    before = files(root)
    assert main(["--root", str(root), "--force"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("pkg/sub/two.py cannot be written: ") and len(err.splitlines()) == 1
    assert files(root) == before and no_debris(tmp_path)
    assert not list(tmp_path.glob("elsewhere/*"))


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, capsys):
    """Whatever rename fails: each file is old or new, an edit is kept until it is forced, and the next run goes on."""
    replace = os.replace
    for fail in range(1, 100):
        root, calls = put(tmp_path / str(fail), c=TWO), 0
        Book.load(root).write()
        mine = ONE_TANGLED + "mine = 1\n"
        (root / "pkg/one.py").write_text(mine)
        put(root, c=NEW)

        def failing(source, target, fail=fail):
            nonlocal calls
            calls += 1
            if calls == fail:
                raise OSError(28, "No space left on device")
            replace(source, target)

        monkeypatch.setattr(os, "replace", failing)
        status = main(["--root", str(root), "--force"])
        monkeypatch.undo()
        err, found = capsys.readouterr().err, files(root)
        assert no_debris(root)
        assert found["pkg/one.py"] in (mine, texts(root)["pkg/one.py"])
        assert found["pkg/sub/two.py"] in ("two = 2\n", "two = 3\n")
        if status:
            assert status == 2 and "No space left on device; tangle again to go on from there" in err
        if found["pkg/one.py"] == mine:  # what was not overwritten by force is not overwritten without
            assert main(["--root", str(root)]) == 2
            assert "pkg/one.py was edited by hand" in capsys.readouterr().err
            assert files(root) == found
        assert main(["--root", str(root), "--force"]) == 0
        assert files(root) == texts(root) and Book.load(root).write() == ([], [], [])
        capsys.readouterr()
        if calls < fail:
            break
    assert fail >= 6 and status == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("then", [NEW, NEWER, TWO], ids=["same", "newer", "back"])
def test_a_crash_between_two_renames(tmp_path, then):
    """Killed at any rename: every file is old or new, and the next run ends clean without asking."""
    for fail in range(1, 100):
        root = put(tmp_path / str(fail), c=TWO)
        Book.load(root).write()
        put(root, c=NEW)
        child = os.fork()
        if child == 0:  # dies without any clean-up, at the fail-th rename
            calls, replace = 0, os.replace

            def dying(source, target, fail=fail, replace=replace):
                nonlocal calls
                calls += 1
                if calls == fail:
                    os._exit(9)
                replace(source, target)

            os.replace = dying
            try:
                Book.load(root).write()
            finally:
                os._exit(0)
        died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        found = files(root)
        for path in ("pkg/one.py", "pkg/sub/two.py"):
            assert found[path] in {texts(put(tmp_path / "x", c=page))[path] for page in (TWO, NEW)}
        put(root, c=then)
        Book.load(root).write()
        assert files(root) == texts(root) and no_debris(root)
        assert Book.load(root).write() == ([], [], [])
        (root / "pkg/one.py").write_text("mine = 1\n")  # an edit is still seen as one
        with pytest.raises(WriteError):
            Book.load(root).write()
        if not died:
            break
    assert fail >= 6


def test_a_damaged_memory_is_no_obstacle(tmp_path):
    put(tmp_path, c=TWO)
    Book.load(tmp_path).write()
    outside = tmp_path.parent / "x"
    outside.write_text("")
    memory = tmp_path / ".tangle/last"
    (memory / "..%2Fx").write_text("")  # nothing that the book could have written
    (memory / "pkg%2Fsub%2Ftwo.py").write_bytes(b"\xff")
    (memory / "pkg%2Fone.py").unlink()
    assert Book.load(tmp_path).write() == ([], [], [])
    assert outside.exists()
    put(tmp_path, c=NEW)
    assert Book.load(tmp_path).write().written == ["pkg/one.py", "pkg/sub/two.py"]


def test_several_tanglers_at_once(tmp_path):
    put(tmp_path, c=TWO)
    running = [
        subprocess.Popen([sys.executable, PROGRAM, "--root", tmp_path], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = "".join(process.communicate(timeout=60)[0] for process in running)
    assert [process.returncode for process in running] == [0, 0, 0]
    assert sorted(said.splitlines()) == ["wrote pkg/one.py", "wrote pkg/sub/two.py"]
    assert files(tmp_path) == texts(tmp_path) and no_debris(tmp_path)


# ------------------------------------------------------------------------------------------------------------
# A part of the book


GROWING = {
    "chapters/01-a": """\
        ```python {#one file="pkg/one.py"}
        def f(x):
            # <<Warm up>>
            return x
        ```
        """,
    "chapters/02-b": """\
        ```python {#one}
        def g(x):
            return f(x)
        ```
        ```python {#two file="pkg/two.py"}
        two = 2
        ```
        """,
    "chapters/10-c": """\
        ```python {#warm-up}
        x += 1
        ```
        ```python {#two}
        three = 3
        ```
        """,
    "index": """\
        ```python {#two}
        last = 1
        ```
        """,
}


def test_the_book_as_of_a_chapter(tmp_path):
    put(tmp_path, **GROWING)
    whole = texts(tmp_path)
    part = {
        number: {path: made.text for path, made in Book.load(tmp_path, upto=number).tangle().items()}
        for number in (1, 2, 9, 10, 99)
    }
    one = "def f(x):\n    # Warm up\n    return x\n"
    assert part[1] == {"pkg/one.py": one}
    assert (
        part[2]
        == part[9]
        == {
            "pkg/one.py": one + "\n\ndef g(x):\n    return f(x)\n",
            "pkg/two.py": "two = 2\n\nlast = 1\n",  # the index has no number
        }
    )
    assert part[10] == part[99] == whole
    assert Book.load(tmp_path, upto=2).where("pkg/two.py", 3) == ("book/index.md", 2)
    with pytest.raises(WriteError, match="a folder of its own"):
        Book.load(tmp_path, upto=2).write()


def test_a_part_that_is_no_python_is_reported(tmp_path):
    page = GROWING | {"chapters/01-a": GROWING["chapters/01-a"].replace("            return x\n", "")}
    put(tmp_path, **page)
    assert "    x += 1\n" in texts(tmp_path)["pkg/one.py"]
    with pytest.raises(TangleError) as info:
        Book.load(tmp_path, upto=2).tangle()
    assert str(info.value) == (
        "book/chapters/01-a.md:3: pkg/one.py does not compile as of chapter 2: expected an indented block "
        "after function definition on line 1, for <<Warm up>> is filled only in book/chapters/10-c.md"
    )
    put(tmp_path, **GROWING | {"chapters/02-b": GROWING["chapters/02-b"].replace("two = 2", "two = (")})
    with pytest.raises(TangleError, match=r"02-b\.md:6: pkg/two\.py does not .* chapter 2: '\(' was never"):
        Book.load(tmp_path, upto=2).tangle()


def test_errors_of_later_chapters_do_not_matter_to_a_part(tmp_path):
    put(tmp_path, **GROWING, **{"chapters/11-d": "```python {#nobody}\n"})
    assert list(Book.load(tmp_path, upto=10).tangle()) == ["pkg/one.py", "pkg/two.py"]
    with pytest.raises(TangleError, match="11-d"):
        Book.load(tmp_path, upto=11).tangle()


def test_a_part_is_written_elsewhere(tmp_path, capsys):
    root = put(tmp_path / "root", **GROWING)
    Book.load(root).write()
    package = files(root)
    main_ = ["--root", str(root), "--upto"]
    assert main([*main_, "2"]) == 0
    out = capsys.readouterr().out
    folder = root / "_build/upto/02"
    assert out == f"wrote pkg/one.py in {folder}\nwrote pkg/two.py in {folder}\n"
    assert files(folder)["pkg/two.py"] == "two = 2\n\nlast = 1\n"
    assert main([*main_, "1", "--output", str(folder)]) == 0
    assert "removed pkg/two.py" in capsys.readouterr().out and list(files(folder)) == ["pkg/one.py"]
    (folder / "pkg/one.py").write_text("mine = 1\n")
    assert main([*main_, "2", "--output", str(folder)]) == 2
    assert "edited by hand" in capsys.readouterr().err
    assert main([*main_, "99", "--output", str(root / "_build/all")]) == 0
    assert files(root / "_build/all") == package

    other = put(tmp_path / "other", c=TWO)
    for taken in (
        root,
        tmp_path,
        root / "pkg",
        root / "book/x",
        root / "tests",
        other,
    ):
        before = files(taken)
        capsys.readouterr()
        assert main([*main_, "2", "--output", str(taken), "--force"]) == 2
        assert capsys.readouterr().err.startswith(f"{taken} holds files of a book")
        assert files(taken) == before
    assert {path: text for path, text in files(root).items() if path.startswith("pkg/")} == package


# ------------------------------------------------------------------------------------------------------------
# Watching


def test_watch_writes_after_every_change_and_goes_on_after_errors(tmp_path, capsys):
    put(tmp_path, c=TWO)
    said = []

    def looks():
        yield "wrote pkg/one.py\nwrote pkg/sub/two.py\n"  # at once
        yield ""
        put(tmp_path, c=NEW)
        yield ""  # perhaps it is not all there yet
        yield "wrote pkg/one.py\nwrote pkg/sub/two.py\n"
        yield ""
        put(tmp_path, c=NEW.rstrip() + "\n    ```python {#nobody}\n")
        yield ""
        yield "book/c.md:21: no file includes the chunk #nobody\nbook/c.md:21: the fence ``` is not closed\n"
        yield ""
        put(tmp_path, d="```python {#two}\nmore = 1\n```\n", c=NEW)
        yield ""
        yield "wrote pkg/sub/two.py\n"
        (tmp_path / "pkg/one.py").write_text("mine = 1\n")
        (tmp_path / "book/d.md").unlink()
        yield ""
        yield "pkg/one.py was edited by hand"
        raise KeyboardInterrupt

    expected = looks()

    def pause():
        out, err = capsys.readouterr()
        said.append(out + err)
        try:
            wanted.append(next(expected))
        except StopIteration:
            raise AssertionError from None

    wanted = [next(expected)]
    assert watch(tmp_path, pause) == 0
    assert len(said) == len(wanted)
    assert said[:-1] == wanted[:-1]
    assert said[-1].startswith(wanted[-1])


def test_watch_ends_quietly_with_an_interrupt(tmp_path):
    put(tmp_path, c=TWO)
    process = subprocess.Popen(
        [sys.executable, PROGRAM, "--root", tmp_path, "--watch"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "wrote pkg/one.py\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert files(tmp_path).items() <= texts(tmp_path).items()


# ------------------------------------------------------------------------------------------------------------
# The way back


def test_where(tmp_path, capsys, monkeypatch):
    put(tmp_path, c=TWO)
    book = Book.load(tmp_path)
    assert [book.where("pkg/one.py", n)[1] for n in range(1, 9)] == [4, 5, 5, 5, 13, 14, 19, 15]
    assert book.where(tmp_path / "pkg/one.py", 7) == ("book/c.md", 19)
    assert book.tangled_at("book/c.md", 19) == [("pkg/one.py", 7)]
    assert book.tangled_at("book/c.md", 1) == []

    def where(*places):
        status = main(["--root", str(tmp_path), "where", *places])
        out, err = capsys.readouterr()
        return status, (out or err).splitlines()

    assert where("pkg/one.py:7", "book/c.md:19") == (0, ["book/c.md:19", "pkg/one.py:7"])
    Book.load(tmp_path).write()
    monkeypatch.chdir(tmp_path / "pkg")
    assert where("one.py:7", "./sub/two.py:1") == (0, ["book/c.md:19", "book/c.md:9"])
    assert where("o.py:7") == (2, ["no chapter makes o.py"])
    assert where("pkg/on.py:7") == (2, ["no chapter makes pkg/on.py; did you mean pkg/one.py?"])
    assert where("pkg/one.py:7") == (0, ["book/c.md:19"])
    assert where("one.py:70") == (2, ["pkg/one.py has no line 70: it ends with line 8"])
    assert where("one.py") == (2, ["'one.py' is not of the form FILE:LINE"])
    assert where("book/c.md:1") == (2, ["book/c.md:1 is not a line of the package: it stands in the prose"])
    assert where("book/c.md:3") == (
        2,
        ["book/c.md:3 is not a line of the package: it stands in Block #one at book/c.md:3"],
    )


DISTRIBUTION = (
    TWO
    + """
    ```python {#px file="providers/px-python/px/core.py"}
    px = 1
    ```
    """
)


@pytest.mark.parametrize(
    "said, rewritten",
    [
        ('  File "pkg/one.py", line 7, in f', '  File "book/c.md", line 19, in f'),
        ('  File "/a dir/site-packages/pkg/one.py", line 7, in f', '  File "book/c.md", line 19, in f'),
        ('  File "C:\\x\\pkg\\sub\\two.py", line 1', '  File "book/c.md", line 9'),
        ("pkg/one.py:7: AssertionError", "book/c.md:19: AssertionError"),
        ("./pkg/one.py:7:9: E225 missing", "book/c.md:19:5: E225 missing"),
        ("pkg/one.py:8:5: E225", "book/c.md:15:5: E225"),
        ("--> pkg/one.py:7:9", "--> book/c.md:19:5"),
        ("> /home/u/pkg/one.py(7)f()", "> book/c.md(19)f()"),
        ("at pkg/one.py, line 7, and (pkg/sub/two.py:1)", "at book/c.md, line 19, and (book/c.md:9)"),
        ("see pkg/one.py line 7.", "see book/c.md line 19."),
        ("'pkg/one.py:7'", "'book/c.md:19'"),
        ("\x1b[1m\x1b[31mpkg/one.py\x1b[0m:7: Error", "\x1b[1m\x1b[31mbook/c.md\x1b[0m:19: Error"),
        ("\x1b[31m/r/pkg/one.py\x1b[0m:\x1b[1m7\x1b[0m", "\x1b[31mbook/c.md\x1b[0m:\x1b[1m19\x1b[0m"),
        ("/v/site-packages/px/core.py:1: in f", "book/c.md:23: in f"),
        ("providers/px-python/px/core.py:1", "book/c.md:23"),
        ('"see a/b and pkg/one.py:7"', '"see a/b and book/c.md:19"'),
        # and what is left alone
        ("notpkg/one.py:7 other.pkg/one.py:7 pkg/one.pyc:7 pkg/one.py pkg/one.py:x", None),
        ("pkg/one.py:99 pkg/one.py:0", None),
        ("pkg/three.py:7", None),
    ],
)
def test_trace_rewrites_places(tmp_path, said, rewritten):
    tracer = Tracer(Book.load(put(tmp_path, c=DISTRIBUTION)))
    assert tracer.rewrite(said) == (said if rewritten is None else rewritten)
    assert tracer.rewrite(f"{said}\n{said}\n") == f"{rewritten or said}\n" * 2


def trace(root, *command, given=None):
    """Status and output of ``trace``, within this process (but for the command)."""
    with pytest.MonkeyPatch.context() as patch:
        out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        if given is not None:
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), "utf-8"))
        status = main(["--root", str(root), "trace", *map(str, command)])
        return status, out.buffer.getvalue(), err.buffer.getvalue()


def test_trace_runs_a_command(tmp_path, monkeypatch):
    put(tmp_path, c=TWO.replace("x += 1", "x += None"))
    Book.load(tmp_path).write()
    code = "import sys; print('pkg/one.py:7', flush=True); sys.path[:0] = '.'; from pkg.one import f; f(1)"
    monkeypatch.chdir(tmp_path)
    status, out, err = trace(tmp_path, "--", sys.executable, "-c", code)
    assert status == 1
    assert out == b"book/c.md:19\n"
    assert b'File "book/c.md", line 19, in f\n' in err and b"TypeError" in err

    code = "import sys; sys.stdout.buffer.write(b'\\xff pkg/one.py:7\\r no newline'); sys.exit(7)"
    done = trace(tmp_path, "--", sys.executable, "-c", code)
    assert done == (7, b"\xff book/c.md:19\r no newline", b"")
    assert trace(tmp_path, "--", sys.executable, "-c", "import os; os.kill(os.getpid(), 9)")[0] == 128 + 9
    assert trace(tmp_path, "--", tmp_path / "nothing")[0] == 127
    assert trace(tmp_path, given=b"pkg/one.py:7\r\n\xff")[1] == b"book/c.md:19\r\n\xff"


def test_trace_shows_a_prompt_at_once(tmp_path):
    put(tmp_path, c=TWO)
    code = "print('at pkg/sub/two.py:1? ', end='', flush=True); print(input() + '!')"
    process = subprocess.Popen(
        [sys.executable, PROGRAM, "--root", tmp_path, "trace", sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    wanted = b"at book/c.md:9? "
    assert process.stdout.read(len(wanted)) == wanted
    assert process.communicate(b"yes\n", timeout=60)[0] == b"yes!\n"
    assert process.returncode == 0


def test_trace_with_a_broken_or_stale_book_still_shows_everything(tmp_path):
    put(tmp_path, c="```python\n")
    status, out, err = trace(tmp_path, given=b"pkg/one.py:7\n")
    assert (status, out) == (0, b"pkg/one.py:7\n")
    assert b"book/c.md:1: the fence ``` is not closed" in err
    put(tmp_path, c=TWO)
    status, out, err = trace(tmp_path, given=b"pkg/one.py:7\n")
    assert out == b"book/c.md:19\n"
    assert b"not what the book makes now: pkg/one.py, pkg/sub/two.py" in err


def test_list(tmp_path, capsys):
    put(tmp_path, c=TWO, d='```python {#one}\nlast = 1\n```\n```python {#e file="pkg/e.py"}\n```\n')
    assert main(["--root", str(tmp_path), "list"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "pkg/e.py  (0 lines)  book/d.md",
        "pkg/one.py  (11 lines)  book/c.md, book/d.md",
        "pkg/sub/two.py  (1 lines)  book/c.md",
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--check", "--force"],
        ["--check", "list"],
        ["nonsense"],
        ["where"],
        ["--watch", "--force"],
        ["--watch", "--check"],
        ["--upto", "3", "--check-order"],
        ["--upto", "three"],
        ["--output", "x"],
        ["--force", "stitch"],
    ],
)
def test_misuse_of_the_command_line(arguments, capsys):
    with pytest.raises(SystemExit) as info:
        main(arguments)
    assert info.value.code == 2 and "usage:" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------
# This repository


@pytest.mark.skipif(not (REPOSITORY / "book").is_dir(), reason="not in the repository")
def test_this_package_is_what_this_book_makes():
    book = Book.load(REPOSITORY)
    drifts = book.check()
    assert not drifts, "\n".join(drift.message for drift in drifts)
    for path, made in book.tangle().items():
        if path.endswith(".py"):
            compile(made.text, path, "exec")
    assert book.upto(999).tangle() == book.tangle()
