"""Small books in temporary folders, for the tests of the tangler."""

import os
import subprocess
import textwrap

from tools.literate.writing import TEMPORARY
from tools.tangle import Book

TWO = """\
    # A chapter

    ```python {#one file="pkg/one.py"}
    \"\"\"One.\"\"\"
    import os
    ```

    ```python {#two file="pkg/sub/two.py"}
    two = 2
    ```

    ```python {#one}
    def f(x):
        # <<Do the work>>
        return x
    ```

    ```python {#do-the-work}
    x += 1
    ```
    """

ONE_TANGLED = '"""One."""\nimport os\n\n\ndef f(x):\n    # Do the work\n    x += 1\n    return x\n'

NEW = TWO.replace("x += 1", "x += 2").replace("two = 2", "two = 3")
NEWER = TWO.replace("x += 1", "x += 5").replace("two = 2", "two = 5")


def put(root, **chapters):
    """Write chapters (``c01="text"`` becomes ``book/c01.md``) and return the root."""
    for name, text in chapters.items():
        path = root / "book" / f"{name}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else textwrap.dedent(text).encode())
    return root


def texts(root):
    return {path: made.text for path, made in Book.load(root).tangle().items()}


def files(root):
    """All files under a root but the tangler's memory and the book."""
    return {
        path.relative_to(root).as_posix(): path.read_text("utf-8")
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.relative_to(root).parts[0] not in (".tangle", "book", ".git")
    }


def no_debris(root):
    return not [path for path in root.rglob("*") if path.name.endswith(TEMPORARY)]


def git(root, *arguments):
    names = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "init.defaultBranch=main"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    return subprocess.run(
        ["git", "-C", str(root), *names, *arguments],
        check=True,
        capture_output=True,
        text=True,
        env=environment | {"GIT_CONFIG_GLOBAL": os.devnull},
    ).stdout
