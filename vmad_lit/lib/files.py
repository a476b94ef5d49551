"""Files that are there as a whole or not at all: written beside their place, and then moved to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
import errno
import os
import re
from typing import IO

Path = str | os.PathLike[str]

#: How a new file is opened: it must not be there yet, not even as a link.
NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL
for _name in "O_NOFOLLOW", "O_CLOEXEC", "O_BINARY":
    NEW |= getattr(os, _name, 0)


def draft(path: Path, mode: int = 0o666) -> tuple[str, int]:
    """Make an empty file beside `path`, for :func:`settle`; returns its name and a descriptor to write to.

    `mode` has the permissions, from which the process's umask takes away. Raises OSError if no file could be put at
    `path`: there is a folder, or a device, or its folder is missing or read-only.
    """
    path = os.fspath(path)
    if os.path.isdir(path) or not os.path.basename(path):
        raise IsADirectoryError(errno.EISDIR, "this is a folder, not a file", path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(errno.EINVAL, "this is no ordinary file", path)
    folder, name = os.path.split(path)
    beside = os.path.join(folder, f"{name[:40]}.{os.urandom(8).hex()}.part")
    descriptor = os.open(beside, NEW, mode)
    _remove_remains(folder, name[:40], os.fstat(descriptor))
    return beside, descriptor


def settle(beside: str, path: Path) -> None:
    """Move a file that is written and closed to its place. A link there is replaced, not followed."""
    os.replace(beside, path)
    with suppress(OSError):  # not every system brings folders to the disk
        folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


#: Seconds after which a draft is taken for what a killed process has left.
FORGOTTEN = 3600


def _remove_remains(folder: str, name: str, now: os.stat_result) -> None:
    ours = re.compile(re.escape(name) + r"\.[0-9a-f]{16}\.part")
    with suppress(OSError), os.scandir(folder or ".") as entries:
        for entry in entries:
            if ours.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                status = entry.stat(follow_symlinks=False)
                if status.st_uid == now.st_uid and now.st_mtime - status.st_mtime > FORGOTTEN:
                    os.unlink(entry.path)


@contextmanager
def replacing(path: Path, mode: int = 0o666) -> Iterator[IO[bytes]]:
    """A new file to write to, which takes its place at `path` when the block ends, if it ends without an error."""
    beside, descriptor = draft(path, mode)
    try:
        with open(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        settle(beside, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(beside)
        raise


def try_out(path: Path) -> None:
    """Raise OSError unless a file can be written to `path`; leaves nothing behind.

    For programs that will write at the end of a long run, and had better learn now that they cannot.
    """
    beside, descriptor = draft(path)
    os.close(descriptor)
    os.unlink(beside)
