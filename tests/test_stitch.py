"""Stitching: an edit of the package goes back into its chapter exactly, or it is refused and nothing changes."""

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.books import ONE_TANGLED, TWO, files, git, no_debris, put, texts
from tools.tangle import Book, StitchError, WriteError, main

pytestmark = pytest.mark.serial  # the tangler knows nothing of ranks

PAGES = {
    "a": """\
        # A chapter with a block of each kind

        ```python {#one file="pkg/one.py"}
        \"\"\"One.\"\"\"
        import os
        ```

        - In a list:

          ```python {#one}
          def f(x):
              # <<Do the work>>
              return x
          ```

        ```python {#do-the-work}
        x += 1
        x *= 2
        # <<Inner step>>
        ```

        > ~~~python {#one}
        > class A:
        >     y = 1
        >
        >     def g(self):
        >         # <<Shared>>
        >         return 1
        > ~~~

        ```python {#one}
            def h(self):
                # <<Shared>>
                return 2
        ```
        """,
    "b": """\
        ```python {#shared}

        z = 1
        print(z)

        ```

        ```python {#inner-step}
        for i in x:
            print(i)
        ```

        ```python {#inner-step}
        done = True
        ```

        ```python {#two file="pkg/two.py"}
        a = 1
        b = 2
        ```

        ```python {#two}
        c = 3
        # <<Shared>>
        ```

        ```python {#two}
        def d(): ...
        ```
        """,
}

ONE = '''\
"""One."""
import os


def f(x):
    # Do the work
    x += 1
    x *= 2
    # Inner step
    for i in x:
        print(i)

    done = True
    return x


class A:
    y = 1

    def g(self):
        # Shared
        z = 1
        print(z)
        return 1

    def h(self):
        # Shared
        z = 1
        print(z)
        return 2
'''

TWO_TANGLED = "a = 1\nb = 2\n\nc = 3\n# Shared\nz = 1\nprint(z)\n\n\ndef d(): ...\n"


@pytest.fixture
def root(tmp_path):
    put(tmp_path, **PAGES)
    assert texts(tmp_path) == {"pkg/one.py": ONE, "pkg/two.py": TWO_TANGLED}
    Book.load(tmp_path).write()
    return tmp_path


def pages(root):
    return {path.name: path.read_bytes().decode() for path in sorted((root / "book").iterdir())}


def edit(root, path, *changes):
    """Change lines of a file; each change is a pair of what is there once and what takes its place."""
    text = (root / path).read_text()
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (root / path).write_text(text)
    return text


def stitched(root, *paths):
    """Stitch, see that the package is untouched and what the book makes, and return how the chapters changed."""
    before, package = pages(root), files(root)
    Book.load(root).stitch(paths or None)
    assert files(root) == package == texts(root)
    assert Book.load(root).write() == ([], [], [])
    return {
        name: [
            (old, new)
            for old, new in zip(before[name].split("\n"), text.split("\n"), strict=False)
            if old != new
        ]
        if before[name].count("\n") == text.count("\n")
        else sorted(set(text.split("\n")) ^ set(before[name].split("\n")))
        for name, text in pages(root).items()
        if text != before[name]
    }


def refused(root, *paths):
    """Stitch in vain, see that nothing has changed, and return the reasons."""
    before, package = pages(root), files(root)
    with pytest.raises(StitchError) as info:
        Book.load(root).stitch(paths or None)
    assert (pages(root), files(root)) == (before, package)
    return [str(problem) for problem in info.value.problems]


# -- What is carried ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, expected",
    [
        ([("import os", "import sys")], {"a.md": [("import os", "import sys")]}),
        ([("import os", "import os\nimport sys")], {"a.md": ["import sys"]}),
        ([("    return x\n", "    y = x\n\n    return y\n")], {"a.md": ["      return x", "      return y", "      y = x"]}),
        ([("    y = 1", "    y = 2")], {"a.md": [(">     y = 1", ">     y = 2")]}),
        ([("    y = 1\n", "    y = 1\n\n    w = 2\n")], {"a.md": [">     w = 2"]}),
        ([("    x += 1\n", "")], {"a.md": ["x += 1"]}),
        ([("    x *= 2", "    if x:\n        x *= 2")], {"a.md": ["    x *= 2", "if x:", "x *= 2"]}),
        ([("        print(i)\n", "        print(i)\n        print(x)\n")], {"b.md": ["    print(x)"]}),
        ([("    done = True", "    done = False")], {"b.md": [("done = True", "done = False")]}),
        # the first lines of a chunk, right after its comment
        ([("    x += 1\n", "    # First.\n    x += 1\n")], {"a.md": ["# First."]}),
        # several edits, in several blocks and chapters, also in neighbours
        (
            [("import os", "import re"), ("    x += 1", "    x += 3"), ("        print(i)", "        print(-i)")],
            {"a.md": [("import os", "import re"), ("x += 1", "x += 3")], "b.md": [("    print(i)", "    print(-i)")]},
        ),
        (
            [("    done = True\n    return x", "    done = x > 1\n    return x + 1")],
            {"a.md": [("      return x", "      return x + 1")], "b.md": [("done = True", "done = x > 1")]},
        ),
        ([("\n    done = True\n    return x\n", "")], {"a.md": ["      return x"], "b.md": ["done = True"]}),
        # between two blocks, where the blank lines tell to which the text belongs
        ([("import os\n", "import os\nX = 1\n")], {"a.md": ["X = 1"]}),
        ([("class A:", "# A remark.\nclass A:")], {"a.md": ["> # A remark."]}),
        ([("    return x\n\n\nclass", "    return x\n    # end\n\n\n@wrap\nclass")], {"a.md": ["      # end", "> @wrap"]}),
        ([("    def h(self)", "    @wrap\n    def h(self)")], {"a.md": ["    @wrap"]}),
        # where the indentation tells
        ([("        return 1\n", "        return 1\n    k = 1\n")], {"a.md": [">     k = 1"]}),
        # a blank line can stand after a chunk, but not at its end
        ([("    done = True\n", "    done = True\n\n")], {"a.md": [""]}),
        # a chunk that goes to several places, changed alike in all of them
        ([("        z = 1\n        print(z)\n        return 1", "        z = 5\n        print(z)\n        return 1"),
          ("        z = 1\n        print(z)\n        return 2", "        z = 5\n        print(z)\n        return 2")],
         {"b.md": [("z = 1", "z = 5")]}),
    ],
)  # fmt: skip
def test_edits_that_are_carried(root, changes, expected):
    if "z = 5" in str(changes):
        edit(root, "pkg/two.py", ("z = 1", "z = 5"))
    edit(root, "pkg/one.py", *changes)
    found = stitched(root)
    if found.get("a.md") == []:  # a blank line more: no other line than before
        found["a.md"] = [""]
    assert found == expected


def test_edits_in_several_files_at_once(root, capsys):
    edit(root, "pkg/one.py", ("import os", "import re"), ("        print(i)", "        print(-i)"))
    edit(root, "pkg/two.py", ("a = 1", "a = 10"))
    edited = files(root)
    assert main(["--root", str(root), "stitch"]) == 0
    assert capsys.readouterr().out == "stitched pkg/one.py, pkg/two.py into book/a.md, book/b.md\n"
    assert texts(root) == edited == files(root)
    assert main(["--root", str(root), "stitch"]) == 0
    assert capsys.readouterr() == ("", "no file was edited by hand\n")


def test_only_the_files_that_are_named(root, capsys, monkeypatch):
    edit(root, "pkg/one.py", ("import os", "import re"))
    edit(root, "pkg/two.py", ("a = 1", "a = 10"))
    monkeypatch.chdir(root / "pkg")
    assert main(["--root", str(root), "stitch", "two.py"]) == 0
    assert capsys.readouterr().out == "stitched pkg/two.py into book/b.md\n"
    assert texts(root) == {"pkg/one.py": ONE, "pkg/two.py": files(root)["pkg/two.py"]}
    with pytest.raises(WriteError, match="pkg/one.py was edited"):  # which waits
        Book.load(root).write()
    assert main(["--root", str(root), "stitch", "pkg/thre.py"]) == 2
    assert "no chapter makes pkg/thre.py; did you mean" in capsys.readouterr().err
    (root / "pkg/two.py").unlink()
    assert refused(root, "pkg/two.py") == ["pkg/two.py:1: the file is missing"]


def test_a_dry_run_shows_the_chapters(root, capsys):
    edit(root, "pkg/one.py", ("    x *= 2\n", "    x *= 3\n"))
    before = pages(root)
    assert main(["--root", str(root), "stitch", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("--- book/a.md\n+++ book/a.md (stitched)\n@@ ") and "\n-x *= 2\n+x *= 3\n" in out
    assert pages(root) == before


def test_what_is_not_a_line_of_code_stays_byte_for_byte(root):
    for name in ("a", "b"):
        path = root / f"book/{name}.md"
        path.write_bytes(
            b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"no newline \t at the end"
        )
    edit(root, "pkg/one.py", ("    y = 1\n", "    y = 1\n\n    w = 2\n"))
    before = pages(root)
    Book.load(root).stitch()
    assert texts(root) == files(root)
    assert pages(root) == before | {
        "a.md": before["a.md"].replace(">     y = 1\r\n", ">     y = 1\r\n>\r\n>     w = 2\r\n")
    }


def test_a_file_with_the_line_ends_of_windows(root):
    edit(root, "pkg/one.py", ("    x *= 2\n", "    x *= 3\n"))
    (root / "pkg/one.py").write_bytes((root / "pkg/one.py").read_bytes().replace(b"\n", b"\r\n"))
    Book.load(root).stitch()
    assert texts(root) == files(root) and b"\r" not in (root / "pkg/one.py").read_bytes()


def test_empty_blocks_and_files_can_be_filled_and_emptied(tmp_path):
    put(
        tmp_path,
        c='```python {#m file="p/m.py"}\n```\n```python {#m}\n\n\n```\n```python {#n file="p/n.py"}\nx = 1\n```\n',
    )
    Book.load(tmp_path).write()
    (tmp_path / "p/n.py").write_text("")
    Book.load(tmp_path).stitch()
    assert texts(tmp_path) == {"p/m.py": "", "p/n.py": ""}
    (tmp_path / "p/n.py").write_text("y = 1\n\nz = 2\n")
    Book.load(tmp_path).stitch()
    assert texts(tmp_path)["p/n.py"] == "y = 1\n\nz = 2\n"
    (tmp_path / "p/m.py").write_text("x = 1\n")
    (reason,) = refused(tmp_path)
    assert (
        reason == "p/m.py:1: belongs to #m at book/c.md:1 or to #m at book/c.md:3, and nothing tells to which"
    )


# -- What is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path, changes, reason",
    [
        # insertions between two blocks
        ("one.py", [("    return x\n\n\n", "    return x\n\n\nnew = 1\n\n\n")],
         "17: belongs to #one at book/a.md:10 or to #one at book/a.md:22, and nothing tells to which"),
        ("one.py", [("    return x\n", "    x = -x\n    return x\n")],
         "14: belongs to #one at book/a.md:10 or to #do-the-work at book/a.md:16, and nothing tells to which"),
        ("two.py", [("# Shared\n", "# Before\n# Shared\n")], None),
        ("two.py", [("a = 1\n", "w = 1\n\na = 1\n")], None),
        # the same line twice: which one is new?
        ("one.py", [("    done = True\n", "    done = True\n    done = True\n")],
         "13: belongs to #one at book/a.md:10 or to #inner-step at book/b.md:13, and nothing tells to which"),
        # one of two paragraphs at the end of a block is new
        ("two.py", [("b = 2\n", "b = 3\n\nnew = 1\n")],
         "2: belongs to #two at book/b.md:17 or to #two at book/b.md:22, and nothing tells to which"),
        # the comment of a chunk
        ("one.py", [("    # Do the work", "    # Do it")],
         "6: '# Do the work' stands for a chunk: change it at book/a.md:12"),
        ("one.py", [("    # Inner step\n", "")],
         "9: '# Inner step' stands for a chunk: change it at book/a.md:19"),
        # less indented than its block
        ("one.py", [("    x *= 2\n", "x *= 2\n")],
         "8: is indented less than the block #do-the-work at book/a.md:16, which it stands in"),
        # several blocks at once, and not line by line
        ("one.py", [("    done = True\n    return x\n", "    pass\n")],
         "13: belongs to #one at book/a.md:10 or to #do-the-work at book/a.md:16 or to #inner-step at book/b.md:13, "
         "and nothing tells to which"),
        # blank lines that are not the author's
        ("one.py", [("import os\n\n\n", "import os\n\n")], "4: the blank lines here are set by the tangler"),
        ("one.py", [('"""One', '\n"""One')], "1: the blank lines here are set by the tangler"),
        ("one.py", [("        return 2\n", "        return 2\n\n")], "31: the blank lines here are set by the tangler"),
        ("one.py", [("    done = True\n", "")], "12: fits no block: the blank lines between blocks are set by the tangler"),
        ("one.py", [("        return 2\n", "        return 2")], "30: the last line does not end"),
        # a chunk in several places
        ("two.py", [("z = 1", "z = 5")], "6: #shared goes into 3 places, and pkg/one.py:22 is not changed in the same way"),
        # text that the Markdown of the chapter would take for its own
        ("one.py", [("    x *= 2\n", "    x *= 2\n    # <<Nothing>>\n")],
         "9: the chapter would be wrong: book/a.md:19: no chunk #nothing for the reference <<Nothing>>"),
        ("one.py", [("import os\n", "import os\n```\n")],
         "3: the chapter would be wrong: book/a.md:11: the fence '```python {#one}' stands within the one opened "
         "at line 7: close that first, or make it longer"),
        ("one.py", [("    x *= 2\n", "    x *= 2\n    # <<Inner step>>\n")], "9: would be tangled as '    # Inner step'"),
        ("one.py", [("    x *= 2\n", "    x *= 2\n     \n")], "9: the blank lines here are set by the tangler"),
    ],
)  # fmt: skip
def test_edits_that_are_refused(root, path, changes, reason):
    edit(root, f"pkg/{path}", *changes)
    if reason is None:
        assert list(stitched(root)) == ["b.md"]
    else:
        assert refused(root) == [f"pkg/{path}:{reason}"]


def test_all_reasons_at_once_and_a_status(root, capsys):
    edit(root, "pkg/one.py", ("    # Do the work", "    # Do it"), ("import os", "import re"))
    edit(root, "pkg/two.py", ("b = 2\n", "b = 2\n\nnew = 1\n"), ("z = 1", "z = 5"))
    before = pages(root)
    assert main(["--root", str(root), "stitch"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and [line.split(": ")[0] for line in err.splitlines()] == [
        "pkg/one.py:6",
        "pkg/two.py:4",
    ]
    assert pages(root) == before


def test_a_chunk_must_be_changed_alike_in_all_its_places(root):
    edit(root, "pkg/two.py", ("z = 1", "z = 5"))
    text = (root / "pkg/one.py").read_text()
    (root / "pkg/one.py").write_text(text.replace("z = 1", "z = 6"))
    assert [reason.split(": ")[0] for reason in refused(root)] == [
        "pkg/one.py:22",
        "pkg/one.py:28",
        "pkg/two.py:6",
    ]
    (root / "pkg/one.py").write_text(text.replace("z = 1", "z = 5"))
    assert len(refused(root, "pkg/one.py")) == 2  # the other file is not asked
    assert stitched(root) == {"b.md": [("z = 1", "z = 5")]}


def test_a_file_that_is_no_text(root):
    (root / "pkg/one.py").write_bytes(b"a = 1\nb = '\xff'\n")
    with pytest.raises(StitchError, match="pkg/one.py:2: not UTF-8: invalid start byte"):
        Book.load(root).stitch()


def test_both_the_book_and_the_file_have_changed(root):
    edit(root, "pkg/one.py", ("import os", "import re"))
    put(root, a=PAGES["a"].replace("x *= 2", "x *= 3"))
    assert refused(root) == [
        "pkg/one.py:8: the book has changed here, too, since it was tangled last (at book/a.md:18): "
        "save the edit, tangle with --force, and edit anew"
    ]
    edit(
        root, "pkg/one.py", ("    x *= 2", "    x *= 3")
    )  # the same as in the book: then only the rest is new
    assert stitched(root) == {"a.md": [("import os", "import re")]}


def test_a_file_that_only_the_book_has_changed_is_no_edit(root, capsys):
    put(root, a=PAGES["a"].replace("x *= 2", "x *= 3"))
    edit(root, "pkg/two.py", ("a = 1", "a = 10"))
    assert main(["--root", str(root), "stitch"]) == 0
    assert capsys.readouterr().out == "stitched pkg/two.py into book/b.md\n"
    assert Book.load(root).write().written == ["pkg/one.py"]


def test_a_fresh_clone_knows_what_was_tangled_from_its_commit(root):
    edit(root, "pkg/one.py", ("import os", "import re"))
    memory = root / ".tangle"
    memory.rename(root / "memory")
    assert refused(root) == [
        "pkg/one.py:1: nobody knows what was tangled into this file last: it may be the book that changed"
    ]
    git(root, "init", "-q")
    git(root, "add", "book")
    git(root, "commit", "-qm", "first")
    (root / "memory").rename(root / "_memory")
    put(root, b=PAGES["b"].replace("print(i)", "print(-i)"))
    assert refused(root)[0].startswith("pkg/one.py:11: the book has changed here, too")
    put(root, b=PAGES["b"])
    Book.load(root).stitch()
    assert (
        texts(root)["pkg/one.py"]
        == (root / "pkg/one.py").read_text()
        == ONE.replace("import os", "import re")
    )


# -- Interrupted ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_nothing_is_lost_whatever_is_interrupted(tmp_path):
    """Killed at any rename: the edit is still in the package, each chapter old or new, and stitching again ends it."""
    for fail in range(1, 100):
        root = put(tmp_path / str(fail), **PAGES)
        Book.load(root).write()
        edit(root, "pkg/one.py", ("import os", "import re"), ("        print(i)", "        print(-i)"))
        edited, before = files(root), pages(root)
        child = os.fork()
        if child == 0:
            calls, replace = 0, os.replace

            def dying(source, target, fail=fail, replace=replace):
                nonlocal calls
                calls += 1
                if calls == fail:
                    os._exit(9)
                replace(source, target)

            os.replace = dying
            try:
                Book.load(root).stitch()
            finally:
                os._exit(0)
        died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        assert files(root) == edited
        new = {"a.md": before["a.md"].replace("import os", "import re"),
               "b.md": before["b.md"].replace("print(i)", "print(-i)")}  # fmt: skip
        found = {name: text for name, text in pages(root).items() if name in new}
        assert all(text in (before[name], new[name]) for name, text in found.items())
        Book.load(root).stitch()
        assert Book.load(root).write().written == []
        assert {name: text for name, text in pages(root).items() if name in new} == new
        assert files(root) == texts(root) == edited and no_debris(root)
        if not died:
            break
    assert fail >= 4


def test_a_full_disk(root, monkeypatch):
    edit(root, "pkg/one.py", ("import os", "import re"), ("        print(i)", "        print(-i)"))
    edited, replace = files(root), os.replace

    def failing(source, target):
        if str(target).endswith("b.md"):
            raise OSError(28, "No space left on device", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(WriteError, match=r"b\.md: No space left on device; stitch again"):
        Book.load(root).stitch()
    monkeypatch.undo()
    assert files(root) == edited and no_debris(root)
    Book.load(root).stitch()
    assert texts(root) == edited


def test_a_chapter_that_is_saved_meanwhile(root):
    edit(root, "pkg/one.py", ("import os", "import re"))
    book = Book.load(root)
    put(root, a=PAGES["a"] + "        More prose.\n")
    before = pages(root)
    with pytest.raises(WriteError, match="book/a.md was changed a moment ago"):
        book.stitch()
    assert pages(root) == before


# -- Any edits ------------------------------------------------------------------------------------------------


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["pkg/one.py", "pkg/two.py"]),
        st.integers(0, 40),
        st.sampled_from(["change", "add", "double", "blank", "remove", "remove two"]),
        st.sampled_from(["", "    ", "        "]),
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(EDITS)
def test_any_edit_is_carried_exactly_or_refused(tmp_path_factory, edits):
    root = put(tmp_path_factory.mktemp("book"), **PAGES)
    made = {"pkg/one.py": ONE.split("\n")[:-1], "pkg/two.py": TWO_TANGLED.split("\n")[:-1]}
    Book.load(root).write()
    for n, (path, at, kind, indent) in enumerate(edits):
        lines = made[path]
        at = at % len(lines)
        here = lines[at]
        lines[at : at + 1] = {
            "change": [here + f" + {n}"],
            "add": [here, f"{indent}new_{n} = 1"],
            "double": [here, here],
            "blank": [here, ""],
            "remove": [],
            "remove two": [],
        }[kind]
        if kind == "remove two":
            del lines[at : at + 1]
        lines[:] = lines or ["x = 1"]
    edited = {path: "".join(line + "\n" for line in lines) for path, lines in made.items()}
    for path, text in edited.items():
        (root / path).write_text(text)
    before = pages(root)
    try:
        Book.load(root).stitch()
    except StitchError as error:
        assert pages(root) == before
        for problem in error.problems:
            assert 1 <= problem.line <= max(1, edited[problem.chapter].count("\n"))
    else:
        assert texts(root) == edited
        assert [Book.load(root).write(), no_debris(root)] == [([], [], []), True]
    assert files(root) == edited


@pytest.mark.parametrize("line", ["import os", "x += 1", "for i in x:", "y = 1", "def h(self):"])
def test_a_line_of_a_block_used_once_is_carried(root, line):
    """The everyday case: the line is changed, followed by another, and removed."""
    for new in (["{} + 1"], ["{}", "{}2"], []):
        lines = (root / "pkg/one.py").read_text().split("\n")
        at = [text.strip() for text in lines].index(line)
        lines[at : at + 1] = [text.format(lines[at]) for text in new]
        (root / "pkg/one.py").write_text("\n".join(lines))
        Book.load(root).stitch()
        assert texts(root)["pkg/one.py"] == "\n".join(lines)
        put(root, **PAGES)
        Book.load(root).write()


def test_the_tangler_remembers_what_was_stitched(root):
    text = edit(root, "pkg/one.py", ("import os", "import re"))
    Book.load(root).stitch()
    put(root, a=PAGES["a"])  # the edit is taken back in the chapter
    assert Book.load(root).write().written == ["pkg/one.py"]
    assert text != (root / "pkg/one.py").read_text() == ONE


def test_a_small_book_by_its_command(tmp_path, capsys):
    put(tmp_path, c=TWO)
    Book.load(tmp_path).write()
    (tmp_path / "pkg/one.py").write_text(ONE_TANGLED.replace("x += 1", "x += 2"))
    assert main(["--root", str(tmp_path), "stitch", str(tmp_path / "pkg/one.py")]) == 0
    assert capsys.readouterr().out == "stitched pkg/one.py into book/c.md\n"
    assert "\nx += 2\n" in (tmp_path / "book/c.md").read_text()
