"""Which branches of the functions of operators a run takes."""

from __future__ import annotations

import dis
import linecache
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

from .operator import Primitive

PACKAGE = os.path.dirname(os.path.dirname(__file__))


class UntakenBranch(UserWarning):
    """A test of derivatives saw only one side of a decision."""


class Branches:
    """Which instructions of some functions followed each other.

    Attributes
    ----------
    followers : dict
        From code objects to dicts, from the offset of an instruction to the set of those that came next.
    """

    def __init__(self, codes: Iterable[CodeType]) -> None:
        self.followers: dict[CodeType, dict[int, set[int]]] = {code: {} for code in codes}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """A context in which instructions are noted; unless a debugger or the like has Python's attention."""
        if sys.gettrace() is not None or not self.followers:
            yield
            return
        sys.settrace(self._enter)
        try:
            yield
        finally:
            sys.settrace(None)

    def _enter(self, frame: FrameType, event: str, arg: object) -> Any:
        followers = self.followers.get(frame.f_code)
        if followers is None:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines, last = True, False, -1

        def note(frame: FrameType, event: str, arg: object) -> Any:
            nonlocal last
            if event == "opcode":
                followers.setdefault(last, set()).add(frame.f_lasti)
                last = frame.f_lasti
            return note

        return note

    def untaken(self) -> Iterator[tuple[CodeType, int]]:
        """The decisions that went only one way: code objects and lines."""
        for code, followers in self.followers.items():
            lines = {offset: line for start, end, line in code.co_lines() for offset in range(start, end, 2)}
            for here in dis.get_instructions(code):
                if "JUMP" in here.opname and "IF" in here.opname and len(followers.get(here.offset, ())) == 1:
                    yield code, lines.get(here.offset) or code.co_firstlineno


def codes_of(primitives: Iterable[Primitive]) -> Iterator[CodeType]:
    """The code of the functions of primitives, as they were written; but not of ours."""
    for primitive in primitives:
        function = getattr(primitive.impl, "__wrapped__", primitive.impl)
        code = getattr(function, "__code__", None)
        if code is not None and not code.co_filename.startswith(PACKAGE):
            yield code


def describe_branch(code: CodeType, line: int) -> str:
    """Words for a decision that went only one way."""
    text = linecache.getline(code.co_filename, line).strip()
    return f"'{text}' in {code.co_name}, at {code.co_filename}:{line}"
