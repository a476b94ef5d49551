"""The order of dependence: a module uses only what earlier chapters have built, and no two use each other."""

from pathlib import Path

import pytest

from tests.books import put
from tools import tangle
from tools.tangle import Book, main

pytestmark = pytest.mark.serial  # the tangler knows nothing of ranks

INDEX = """\
    # A book

    ```{toctree}
    :hidden:

    01-first
    The second <02-second.md>
    03-third
    ```
    """


def book(root, **modules):
    """A book of three chapters, each block given as ``name_chapter="code"``: the file name.py of package p."""
    chapters = dict.fromkeys(["01-first", "02-second", "03-third"], "# A title\n")
    begun = set()
    for key, code in modules.items():
        name, number = key.rsplit("_", 1)
        file = (
            "" if name in begun else f' file="p/{name}.py"'.replace("init", "__init__").replace("__in__", "/")
        )
        begun.add(name)
        chapter = list(chapters)[int(number[0]) - 1]
        chapters[chapter] += f"```python {{#{name.replace('_', '-')}{file}}}\n{code}\n```\n"
    return Book.load(put(root, index=INDEX, **{name: text.encode() for name, text in chapters.items()}))


def found(root, **modules):
    return [str(problem) for problem in book(root, **modules).check_order()]


@pytest.mark.parametrize(
    "code",
    [
        "from p.b import f",
        "from .b import f",
        "from p.b import (\n    f,\n)",
        "def g():\n    from p.b import f",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.b import f",
        "try:\n    from p.b import f\nexcept ImportError:\n    f = None",
        "class A:\n    from p.b import f as g",
    ],
)
def test_a_name_that_a_later_chapter_builds(tmp_path, code):
    """The module is older than the import, its name is not."""
    at = code.index("f,") if "(\n" in code else code.index("import f")
    line = code[:at].count("\n") + 3
    assert found(tmp_path, b_1="x = 1", a_2=code, b_3="def f():\n    pass") == [
        f"book/02-second.md:{line}: p.a imports 'f' from p.b, which chapter 03 builds later"
    ]
    assert found(tmp_path, b_1="x = 1", a_2=code, b_2="def f():\n    pass") == []
    assert found(tmp_path, b_1="x = 1\ndef f():\n    pass", a_2=code, b_3="y = 1") == []


@pytest.mark.parametrize(
    "bound",
    [
        "f = 1",
        "f: int = 1",
        "x, (f, y) = 1, (2, 3)",
        "class f:\n    pass",
        "async def f():\n    pass",
        "if x:\n    f = 1",
        "try:\n    pass\nexcept OSError:\n    f = 1",
        "for f in []:\n    pass",
        "with open(x) as f:\n    pass",
        "from math import floor as f",
        "import math as f",
        "match x:\n    case 1:\n        f = 1",
        "while x:\n    break\nelse:\n    f = 1",
    ],
)
def test_whatever_binds_a_name_builds_it(tmp_path, bound):
    late = "book/02-second.md:3: p.a imports 'f' from p.b, which chapter 03 builds later"
    assert found(tmp_path, b_1="x = 1", a_2="from p.b import f", b_3=bound) == [late]
    assert found(tmp_path, b_1=f"x = 1\n{bound}", a_2="from p.b import f", b_3="def f(): ...") == []


def test_what_functions_bind_is_no_name_of_the_module(tmp_path):
    late = "book/02-second.md:3: p.a imports 'f' from p.b, which chapter 03 builds later"
    inner = "def g():\n    f = 1\nclass A:\n    f = 1"
    assert found(tmp_path, b_1=inner, a_2="from p.b import f", b_3="f = 1") == [late]


def test_modules(tmp_path):
    assert found(tmp_path, init_1="", a_2="import p.b", b_3="x = 1") == [
        "book/02-second.md:3: p.a imports p.b, which chapter 03 builds later"
    ]
    assert found(tmp_path, init_1="", a_2="from . import b\nb.x", b_3="x = 1") == [
        "book/02-second.md:3: p.a imports p.b, which chapter 03 builds later"  # and not each use of it
    ]
    assert (
        found(tmp_path, init_1="", b_1="", a_2="import os.path, numpy\nfrom p import b\nfrom q import r")
        == []
    )


def test_names_reached_through_a_module(tmp_path):
    late = "book/02-second.md:{}: p.a uses 'f' of p.b, which chapter 03 builds later"
    for code, line in [
        ("from p import b\n\nb.f()", 5),
        ("import p.b as c\n\ndef g():\n    return c.f", 6),
    ]:
        assert found(tmp_path, b_1="x = 1", a_2=code, b_3="f = 1") == [late.format(line)]
        assert found(tmp_path, b_1="x = 1", a_2="y = 1", b_3="f = 1", a_3=code) == []
    # another thing of that name
    assert found(tmp_path, b_1="x = 1", a_2="from p import b\ndef g(b):\n    return b.f", b_3="f = 1") == []


def test_a_star_takes_what_is_used(tmp_path):
    star = "from p.b import *\n\ny = x"
    late = "book/02-second.md:6: p.a imports 'f' from p.b, which chapter 03 builds later"
    assert found(tmp_path, b_1="x = 1", a_2=star, b_3="f = 1") == []
    assert found(tmp_path, b_1="x = 1", a_2=star + "\nz = f", b_3="f = 1") == [late]
    assert found(tmp_path, b_1="x = 1", a_2=star, b_3="f = 1", a_3="z = f") == []
    assert found(tmp_path, b_1="__all__ = ['x']\nx = 1", a_2=star + "\nz = f", b_3="f = 1") == []
    # what a star hands on is built where it comes from, and not before the star
    through = "from p.c import f"
    assert found(tmp_path, b_1="x = 1", c_1="from p.b import *", a_2=through, b_3="f = 1") == [
        "book/02-second.md:3: p.a imports 'f' from p.c, which chapter 03 builds later"
    ]
    assert found(tmp_path, b_1="f = 1", c_1="x = 1", a_2=through, c_3="from p.b import *") == [
        "book/02-second.md:3: p.a imports 'f' from p.c, which chapter 03 builds later"
    ]


def test_the_line_of_an_import_counts_and_not_its_module(tmp_path):
    assert found(tmp_path, a_1="x = 1", b_2="f = 1", a_3="from p.b import f") == []


@pytest.mark.parametrize(
    "modules, circle",
    [
        ({"a_1": "x = 1", "b_2": "from p.a import x", "a_3": "from p.b import x"},
         "book/03-third.md:3: modules import each other: p.a -> p.b -> p.a"),
        ({"a_1": "x = 1", "b_1": "import p.a", "c_2": "from . import b", "a_3": "def f():\n    from .c import b"},
         "book/03-third.md:4: modules import each other: p.a -> p.c -> p.b -> p.a"),
        ({"a_1": "x = 1", "a_2": "import p.a"}, "book/02-second.md:3: modules import each other: p.a -> p.a"),
        ({"init_1": "x = 1", "b_2": "from p import x", "init_2": "from .b import x"},
         "book/02-second.md:6: modules import each other: p -> p.b -> p"),
        ({"b_1": "import p.c", "a_1": "import p.b", "c_1": "import p.b", "d_1": "import p.a"},
         "book/01-first.md:3: modules import each other: p.b -> p.c -> p.b"),
    ],
)  # fmt: skip
def test_circles(tmp_path, modules, circle):
    assert [problem for problem in found(tmp_path, **modules) if "other" in problem] == [circle]


def test_the_first_block_of_the_story_counts_and_not_of_the_file(tmp_path):
    block = "```python {{#{}}}\n{}\n```\n"
    put(
        tmp_path,
        **{
            "01-a": block.format('b file="p/b.py"', "# <<Late>>") + block.format("b", "f = 1"),
            "02-b": block.format('a file="p/a.py"', "from p.b import f, g"),
            "03-c": block.format("late", "f = g = 0"),
        },
    )
    assert [str(problem) for problem in Book.load(tmp_path).check_order()] == [
        "book/02-b.md:2: p.a imports 'g' from p.b, which chapter 03 builds later"
    ]


def test_subpackages_and_distributions(tmp_path):
    put(
        tmp_path,
        **{
            "01-a": '```python {#one file="p/sub/one.py"}\nfrom ..two import f\nfrom .three import g\n```\n'
            '```python {#px file="providers/px-python/px/core.py"}\nx = 1\n```\n'
            '```python {#four file="p/four.py"}\nfrom px.core import x, y\n```\n',
            "02-b": '```python {#two file="p/two.py"}\nf = 1\n```\n```python {#px}\ny = 1\n```\n'
            '```python {#three file="p/sub/three.py"}\ng = 1\n```\n',
        },
    )
    assert [str(problem) for problem in Book.load(tmp_path).check_order()] == [
        "book/01-a.md:2: p.sub.one imports 'f' from p.two, which chapter 02 builds later",
        "book/01-a.md:3: p.sub.one imports 'g' from p.sub.three, which chapter 02 builds later",
        "book/01-a.md:9: p.four imports 'y' from px.core, which chapter 02 builds later",
    ]


def test_the_table_of_contents_is_the_order(tmp_path):
    made = book(tmp_path, a_1="from p.b import f", b_2="f = 1")
    assert made.order == ["book/01-first.md", "book/02-second.md", "book/03-third.md", "book/index.md"]
    assert len(made.check_order()) == 1
    put(
        tmp_path,
        index=INDEX.replace("    01-first\n", "").replace("    03-third\n", "    03-third\n    01-first\n"),
    )
    made = Book.load(tmp_path)
    assert made.order == ["book/02-second.md", "book/03-third.md", "book/01-first.md", "book/index.md"]
    assert [str(problem) for problem in made.check_order()] == [
        "book/index.md:8: book/01-first.md follows book/03-third.md here, but precedes it by its name"
    ]
    put(
        tmp_path,
        index=INDEX.replace("    03-third\n", "    how-to\n    03-third\n"),
        **{"how-to": b"# A page\n"},
    )
    assert len(Book.load(tmp_path).check_order()) == 1  # a page whose name has no number may stand anywhere
    (tmp_path / "book/index.md").unlink()  # then by their names
    assert len(Book.load(tmp_path).check_order()) == 1


def test_the_command_line(tmp_path, capsys, monkeypatch):
    book(tmp_path, a_1="from p.b import f", b_2="f = 1").write()
    line = "book/01-first.md:3: p.a imports 'f' from p.b, which chapter 02 builds later\n"
    for order, arguments, expected in [
        (False, ["--check-order"], (2, line)),
        (False, ["--check", "--check-order"], (2, line)),
        (False, ["--check"], (0, "")),
        (True, ["--check"], (2, line)),
    ]:
        monkeypatch.setattr(tangle, "ORDER_IN_CHECK", order)
        assert (main(["--root", str(tmp_path), *arguments]), capsys.readouterr().err) == expected
    book(tmp_path, b_1="f = 1", a_2="from p.b import f").write()
    assert main(["--root", str(tmp_path), "--check", "--check-order"]) == 0


@pytest.mark.skipif(not tangle.ORDER_IN_CHECK, reason="the book has not yet that order")
def test_this_book_keeps_its_order():
    problems = Book.load(Path(tangle.__file__).parent.parent).check_order()
    assert not problems, "\n".join(map(str, problems))
