"""Each name that the reference lists has an example of the book beside it, and that runs by itself."""

import doctest
from textwrap import dedent

import pytest

pytest.importorskip("sphinx", reason="the book's tools are not installed")
from tools import sphinx_api
from tools.reference_examples import Page, names_of
from tools.tangle import Block

PAGE = "book/chapters/901-api"


def page(text, *listed):
    """The examples of a page with these fences, where the listed names are known."""

    def find(path):
        return (path, "", "") if path in listed else None

    def method(kind, name):
        return next(
            (find(one) for one in listed if one.endswith("." + name) and (not kind or kind in one)), None
        )

    fences = dedent(text).strip("\n").split("\n\n")
    blocks = [
        Block("book/07-page.md", 10 * number, body + "\n", "pycon") for number, body in enumerate(fences)
    ]
    return Page(blocks, find, method)


def best(made, name):
    return min(made.candidates((name, "", "")))[1].text if any(made.candidates((name, "", ""))) else None


def test_what_a_statement_reads_and_binds():
    assert names_of("x = y + x") == ({"x", "y"}, {"x"})
    assert names_of("with B() as m:\n    a = m.input(b)\n    a + m\n") == ({"B", "b"}, {"m", "a"})
    assert names_of("def f(x): return x + z") == ({"z"}, {"f"})
    assert names_of("schedule(1)") == ({"schedule"}, set())
    assert names_of("class C:\n    a = 1\n    b = a + w\n") == ({"w", "__name__"}, {"C"})
    assert names_of("y = [x * k for x in xs]") == ({"k", "xs"}, {"y"})
    assert names_of("import a.b as c, d.e") == (set(), {"c", "d"})


def test_an_example_is_what_the_use_needs_and_what_it_prints():
    made = page(
        """
        >>> import lib
        >>> from lib import other
        >>> unused = 3
        >>> k = 2

        >>> def double(x):
        ...     return lib.scale(x, k)
        >>> 1 + 1
        2
        >>> double(4)
        8
        >>> double(5)
        10
        """,
        "lib.scale",
    )
    assert best(made, "lib.scale") == dedent(
        """\
        >>> import lib
        >>> k = 2
        >>> def double(x):
        ...     return lib.scale(x, k)
        >>> double(4)
        8
        """
    )


def test_what_changes_a_variable_belongs_to_its_example():
    made = page(
        """
        >>> from lib import scale
        >>> x = []
        >>> for one in range(2):
        ...     x.append(one)
        >>> x.append(1)
        >>> len(x)
        3
        >>> y = []
        >>> y.append(2)
        >>> scale(x)
        2
        """,
        "lib.scale",
    )
    expected = ">>> from lib import scale\n>>> x = []\n>>> for one in range(2):\n"
    expected += "...     x.append(one)\n>>> x.append(1)\n>>> scale(x)\n2\n"
    assert best(made, "lib.scale") == expected


def test_names_are_followed_through_imports_and_variables():
    made = page(
        """
        >>> from lib import scale as s, Tape
        >>> import lib.more as more
        >>> s(1)
        1
        >>> with Tape() as t:
        ...     t.fill()
        >>> t.full
        True
        >>> more.cut(t)
        2
        """,
        *("lib.scale", "lib.more.cut", "lib.Tape", "lib.Tape.fill", "lib.unused"),
    )
    assert best(made, "lib.scale").endswith(">>> s(1)\n1\n")
    assert best(made, "lib.more.cut").startswith(
        ">>> from lib import scale as s, Tape\n>>> import lib.more as more\n"
    )
    assert best(made, "lib.Tape.fill").endswith("...     t.fill()\n>>> t.full\nTrue\n")
    assert best(made, "lib.unused") is None
    assert best(page(">>> from lib import scale", "lib.scale"), "lib.scale") is None  # an import is no use


def test_short_and_whole_examples_are_preferred():
    made = page(
        """
        >>> from lib import scale
        >>> scale(unknown)
        0

        >>> for i in range(2):
        ...     print(
        ...         scale(i)
        ...     )
        0
        2

        >>> scale(2)
        4
        """,
        "lib.scale",
    )
    assert best(made, "lib.scale").endswith(">>> scale(2)\n4\n")


def test_every_name_of_the_list_has_an_example():
    listed = sphinx_api.listed_meanings(PAGE)
    assert len(listed) > 150
    missing = [name for wanted, name in listed.items() if sphinx_api.example_of(PAGE, wanted) is None]
    assert not missing, f"no example of the book uses {', '.join(missing)}: add one, for example to {PAGE}.md"


@pytest.mark.serial
@pytest.mark.timeout(300)
def test_every_example_of_the_reference_runs_by_itself():
    from pytest_doctestplus.plugin import OutputChecker

    chosen: dict = {}
    for wanted, name in sphinx_api.listed_meanings(PAGE).items():
        example = sphinx_api.example_of(PAGE, wanted)
        if example is not None:
            chosen.setdefault(example.text, (name, example))
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS | doctest.register_optionflag("FLOAT_CMP")
    reports: list[str] = []
    for text, (name, example) in chosen.items():
        test = doctest.DocTestParser().get_doctest(text, {"__name__": "__main__"}, name, None, 0)
        runner = doctest.DocTestRunner(checker=OutputChecker(), optionflags=flags, verbose=False)
        where = f"{name}, from {example.chapter}:{example.line}"
        runner.run(test, out=lambda words, where=where: reports.append(f"{where}\n{words}"))
    advice = f"a shorter example, for instance in {PAGE}.md, is preferred"
    assert not reports, "\n".join([*reports, advice])
