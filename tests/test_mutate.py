"""The tool that breaks the package: what it breaks, which tests it runs, and that the repository stays as it is."""

import ast
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from textwrap import dedent

import pytest

from tools import mutate
from tools.mutate import (
    Finder,
    Map,
    Results,
    Tree,
    Trial,
    equivalents,
    find_mutants,
    sample,
    scopes_by_line,
    table,
)

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.serial


@pytest.fixture(scope="module")
def every():
    """All mutants of the package."""
    return find_mutants(compiled=True)


def mutants(text, kind=None):
    """The mutants of a text, as (scope, kind, text of the line that changes)."""
    text = dedent(text)
    found = Finder("vmad_lit/lib/toy.py", text).mutants
    return [
        (m.scope, m.kind, m.apply(text).splitlines()[m.line - 1].strip())
        for m in found
        if kind in (None, m.kind)
    ]


@pytest.mark.parametrize(
    "kind, line, broken",
    [
        ("arithmetic", "y = a + b * c", ["y = (a - b * c)", "y = a + (b / c)"]),
        ("arithmetic", "y -= a", ["y += a"]),
        ("arithmetic", "y = '%s' % a", []),
        ("comparison", "y = a < b", ["y = (a <= b)"]),
        ("comparison", "y = a is not b", ["y = (a is b)"]),
        ("logic", "y = not a and b", ["y = ((not a) or (b))", "y = (a) and b"]),
        ("constant", "y = True", ["y = (False)"]),
        ("constant", "y = [0, 0.5]", ["y = [(1), 0.5]", "y = [0, (1.0)]"]),
        ("sign", "y = -a", ["y = (a)"]),
        ("axis", "y = a.sum(axis=0)", ["y = a.sum(axis=(1))"]),
        ("conj", "y = a * numpy.conj(b)", ["y = a * (b)"]),
        ("conj", "y = a.conj()", ["y = (a)"]),
        ("statement", "log(a)", ["pass"]),
        ("statement", "a[0] = b", ["pass"]),
        ("statement", "raise ValueError(a + b)", ["pass"]),
        ("arithmetic", "raise ValueError(a + b)", []),  # a message
        ("comm", "y = pm.comm.allreduce(a)", ["y = (a)"]),
        ("comm", "y = comm.allgather(a)", ["y = ([a] * comm.size)"]),
        (
            "comm",
            "y = total(a, comm)",
            ["y = (total(a, __import__('mpi4py.MPI', fromlist=['*']).COMM_SELF))"],
        ),
        ("reduction", "y = comm.allreduce(a, op=MPI.SUM)", ["y = comm.allreduce(a, op=(MPI.MAX))"]),
        ("root", "y = comm.bcast(a, root)", ["y = (comm.bcast(a, (root + 1) % comm.size))"]),
        ("root", "y = comm.bcast(a)", ["y = (comm.bcast(a, comm.size - 1))"]),
        ("factor", "y = a * b", []),  # this is no derivative
    ],
)
def test_what_is_broken_in_a_line(kind, line, broken):
    found = mutants(f"def f():\n    {line}\n", kind)
    assert sorted(text for _, _, text in found) == sorted(broken)
    assert {scope for scope, _, _ in found} <= {"f"}


def test_what_is_broken_in_a_derivative():
    text = """\
        class f:
            def vjp(node, _y, x, z):
                return dict(_x=_y * z, _z=_y - x)
            fprime = staticmethod(lambda x: x)
        """
    zero = mutate.ZERO
    found = Counter(mutants(text))
    assert {(scope, kind, line.removeprefix("return ")) for scope, kind, line in found} >= {
        ("f.vjp", "zero", f"dict(_x=({zero}), _z=_y - x)"),
        ("f.vjp", "zero", f"dict(_x=_y * z, _z=({zero}))"),
        ("f.vjp", "sign", "dict(_x=(-(_y * z)), _z=_y - x)"),
        ("f.vjp", "swap", "(dict(_x=_y - x, _z=_y * z))"),
        ("f.vjp", "factor", "dict(_x=(z), _z=_y - x)"),
        ("f.vjp", "factor", "dict(_x=(_y), _z=_y - x)"),
        ("f.vjp", "term", "dict(_x=_y * z, _z=(_y))"),
        ("f.vjp", "term", "dict(_x=_y * z, _z=(-x))"),
        ("f.fprime", "sign", "fprime = staticmethod(lambda x: (-(x)))"),
    }
    assert max(found.values()) == 1


def test_a_change_keeps_the_numbers_of_the_lines():
    text = "def f():\n    y = (a +\n         b)\n    call(a,\n         b)\n    return y\n"
    for mutant in Finder("toy.py", text).mutants:
        broken = mutant.apply(text)
        ast.parse(broken)
        assert broken != text and broken.count("\n") == text.count("\n")


def test_types_docstrings_and_formatted_text_are_left_alone():
    assert (
        mutants('''\
        def f(x: a - b = c) -> a - b:
            """Not 1 + 1."""
            import x
            assert x < 1
            return f"{x - y}"
        ''')
        == []
    )


def test_all_mutants_of_the_package_can_be_read_and_have_names_of_their_own(every):
    found = every
    assert max(Counter(mutant.id for mutant in found).values()) == 1
    assert {mutant.kind for mutant in found} == {
        "arithmetic",
        "comparison",
        "logic",
        "constant",
        "sign",
        "axis",
        "conj",
        "statement",
        "comm",
        "reduction",
        "root",
        "zero",
        "swap",
        "term",
        "factor",
    }
    for mutant in found[::500]:
        ast.parse(mutant.apply((ROOT / mutant.file).read_text()))
    assert all(mutant.parallel for mutant in found if mutant.kind in ("comm", "reduction", "root"))


def test_equivalent_mutants_are_those_that_are_meant(every):
    """Where this fails, a function was changed or renamed: see whether the mutants in tools/mutants.toml are still there."""
    lines = {mutant.id: mutant.new for mutant in every}
    listed = equivalents()
    assert {name: told["line"] for name, told in listed.items()} == {name: lines.get(name) for name in listed}
    assert all(told["why"] for told in listed.values())


def test_a_sample_has_of_each_kind_as_many_and_is_the_same_again(every):
    found = every
    some = sample(found, 30, 1)
    counts = Counter(mutant.kind for mutant in some)
    assert set(counts.values()) == {30 // len(counts)}
    assert some == sample(found, 30, 1) != sample(found, 30, 2)
    assert len(set(sample(found[:7], 30, 1))) == 7


def test_lines_belong_to_functions():
    text = dedent("""\
        A = 1
        class C:
            b = 2
            def f(self):
                def g():
                    return 3
                return g
        """)
    assert scopes_by_line(ast.parse(text)) == {1: "A", 3: "C.b", 4: "C", 5: "C.f", 6: "C.f.g", 7: "C.f"}


@pytest.fixture
def toy(tmp_path):
    """A small repository with a book, a package, and tests."""
    root = tmp_path / "toy"
    (root / "book").mkdir(parents=True)
    code = "def double(x):\n    return x + x\n\n\ndef half(x):\n    return x / 2\n"
    (root / "book" / "toy.md").write_text(
        f'# Toy\n\n```python {{#toy file="vmad_lit/lib/toy.py"}}\n{code}```\n'
    )
    (root / "vmad_lit" / "lib").mkdir(parents=True)
    (root / "vmad_lit" / "lib" / "toy.py").write_text(code)
    (root / "tests").mkdir()
    (root / "tests" / "test_toy.py").write_text(
        dedent("""\
        from vmad_lit.lib.toy import double, half

        def test_double():
            assert double(3) == 6

        def test_half():
            assert half(0) == 0

        def test_nothing():
            pass
        """)
    )
    shutil.copytree(ROOT / "tools", root / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "tools" / "mutants.toml").write_text(
        '[equivalent]\n"lib/toy.py:half:constant:1" = { line = "return x / (3)", why = "so be it" }\n'
    )
    (root / "pytest.ini").write_text(
        "[pytest]\npythonpath = .\naddopts = -p no:cacheprovider --import-mode=importlib\n"
    )
    (root / ".git").mkdir()
    return root


def contents(root):
    """All files of a folder but what the tool writes for itself."""
    return {
        path.relative_to(root).as_posix(): path.read_text()
        for path in root.rglob("*")
        if path.is_file() and path.relative_to(root).parts[0] != "_build" and "__pycache__" not in path.parts
    }


def test_mutants_are_tried_on_the_tests_concerned_and_the_repository_stays_as_it_is(toy):
    before = contents(toy)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = [sys.executable, "tools/mutate.py", "--ranks", "1"]
    done = subprocess.run([*run, "--sample", "9"], cwd=toy, env=env, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    rows = done.stdout.splitlines()
    assert "recording what tests/test_toy.py runs" in rows
    ends = {row.split()[2]: row.split()[1] for row in rows if "/" in row.split(" ")[0] and "lib/toy" in row}
    assert ends == {
        "lib/toy.py:double:arithmetic:1": "killed",
        "lib/toy.py:half:arithmetic:1": "survived",
        "lib/toy.py:half:constant:1": "equivalent",
    }
    at = rows.index("    book/toy.md:5")
    assert rows[at + 1 : at + 3] == ["    - return x + x", "    + return (x - x)"]
    assert "tests/test_toy.py::test_double (1 of 1 tests" in done.stdout
    assert rows[-1].split() == ["all", "1", "0", "1", "1"]
    assert contents(toy) == before
    # What is known is not tried again
    again = subprocess.run([*run, "--summary"], cwd=toy, env=env, capture_output=True, text=True)
    assert again.returncode == 0 and "lib/toy.py:half:arithmetic:1" in again.stdout
    assert "double" not in again.stdout.replace(str(toy), "")


def test_a_mutant_that_does_not_end_is_ended(toy):
    (toy / "vmad_lit" / "lib" / "toy.py").write_text(
        "def down(n):\n    while n > 0:\n        n -= 1\n    return n\n"
    )
    (toy / "tests" / "test_toy.py").write_text(
        "from vmad_lit.lib.toy import down\n\ndef test_down():\n    assert down(3) == 0\n"
    )
    tree = Tree(toy)
    with tree.locked():
        known = Map(tree)
        known.tests = {"tests/test_toy.py::test_down": {"seconds": 0.0, "runs": {"vmad_lit/lib/toy.py:down"}}}
        endless = next(mutant for mutant in find_mutants(toy) if mutant.kind == "statement")
        trial = Trial(tree, known)
        trial.patience = 2.0
        verdict = trial.judge(endless)
        assert (verdict.ended, verdict.tests, verdict.of) == ("timed out", 1, 1)
        with pytest.raises(SystemExit, match="in use"), Tree(toy).locked():
            pass
    assert (tree.path / endless.file).read_text() == (toy / endless.file).read_text()


def test_the_copy_follows_the_repository(toy):
    tree = Tree(toy)
    with tree.locked():
        assert not (tree.path / ".git").exists() and not (tree.path / "_build").exists()
    (toy / "tests" / "test_toy.py").unlink()
    (toy / "tests" / "test_new.py").write_text("")
    with tree.locked():
        assert sorted(path.name for path in (tree.path / "tests").iterdir()) == ["test_new.py"]
        with pytest.raises(KeyError), tree.changed("vmad_lit/lib/toy.py", "broken"):
            assert (tree.path / "vmad_lit/lib/toy.py").read_text() == "broken"
            raise KeyError
        assert "broken" not in (tree.path / "vmad_lit/lib/toy.py").read_text()


def test_the_fastest_tests_come_first_within_a_budget():
    known = Map(Tree(ROOT))
    known.tests = {
        "slow": {"seconds": 5.0, "runs": {"a.py:f"}},
        "quick": {"seconds": 1.0, "runs": {"a.py:f"}},
        "other": {"seconds": 0.1, "runs": {"a.py:g"}},
    }
    known.tests["a test of the outer"] = {"seconds": 9.0, "runs": {"a.py:outer"}}
    known.tests["a quick one"] = {"seconds": 0.1, "runs": {"a.py:outer"}}
    outer = Finder("a.py", "def outer():\n    return 1\n").mutants[0]
    assert known.concerned(outer) == ["a test of the outer", "a quick one"]
    inner = Finder("a.py", "def f():\n    def inner():\n        return 1\n").mutants[0]
    assert inner.scope == "f.inner" and known.concerned(inner) == ["quick", "slow"]
    top = Finder("a.py", "A = 1\n").mutants[0]
    assert sorted(known.concerned(top)[:2]) == ["a quick one", "other"] and len(known.concerned(top)) == 5
    assert known.within(["quick", "slow"], 3) == ["quick"] and known.within(["slow"], 3) == ["slow"]


def test_an_end_is_known_as_long_as_the_change_is_the_same(tmp_path):
    (one,) = Finder("a.py", "def f():\n    return 1\n").mutants
    (other,) = Finder("a.py", "def f():\n    return 5\n").mutants
    assert one.id == other.id
    verdict = mutate.Verdict(one.id, one.kind, one.new, "killed", "a test")
    Results(tmp_path / "r.json", {}).add(verdict)
    again = Results(tmp_path / "r.json", {})
    assert again.get(one) == verdict and again.get(other) is None
    assert (
        Results(tmp_path / "r.json", {one.id: {"line": one.new, "why": "why"}}).get(one).ended == "equivalent"
    )
    assert table([verdict, verdict]).splitlines()[-1].split() == ["all", "2", "0", "0", "0"]
