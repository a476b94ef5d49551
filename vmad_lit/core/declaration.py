"""What is wrong with an operator, in words for who wrote it: with its class, and with what its functions do."""

from __future__ import annotations

import inspect
import linecache
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import wraps
from types import FunctionType, GeneratorType, NoneType
from typing import Any

from numpy import float64, ndarray

from .error import BadArgument, BrokenPrimitive, ExecutionError, did_you_mean

FUNCTIONS = "apl", "vjp", "jvp", "hvp", "rcd"
ATTRIBUTES = "ain aout collective transparent fresh alias inplace placements own trusted".split()
FIRST_CALLS = 3  # in which changes of arguments are looked for
Signature = list[str]  # the names of the parameters of a function, the node first


def place_of(prototype: Any) -> str:
    """File and line of the class that declares an operator, as far as they are known."""
    codes = [f.__code__ for f in vars(prototype).values() if isinstance(f, FunctionType)]
    if not codes:
        return f"module {prototype.__module__}"
    code = min(codes, key=lambda code: code.co_firstlineno)
    for line in range(code.co_firstlineno, 0, -1):
        if re.match(rf"\s*class\s+{prototype.__name__}\b", linecache.getline(code.co_filename, line)):
            return f"{code.co_filename}:{line}"
    return f"{code.co_filename}:{code.co_firstlineno}"


def named(prototype: Any) -> str:
    """An operator and its place, for messages."""
    return f"operator {prototype.__name__}, declared at {place_of(prototype)}"


def check_class(prototype: Any, functions: Sequence[str] = FUNCTIONS) -> None:
    """Complain about a class that lacks what an operator needs: names, and the first of its functions."""
    if not isinstance(prototype, type):
        hint = "; for a function that builds a model there is autooperator" if callable(prototype) else ""
        raise BadArgument(f"an operator is declared by a class, and this is {prototype!r}{hint}")
    known = [*functions, *ATTRIBUTES]
    missing = [name for name in known if not hasattr(prototype, name)]
    for name in vars(prototype):
        meant = misspelt(name, missing) if name not in known and name[:2] != "__" else None
        if meant:
            raise BrokenPrimitive(f"{named(prototype)}: '{name}' means nothing here; did you mean '{meant}'?")
    # Complain about what is missing
    for name, what in ("ain", "of the arguments that have derivatives"), ("aout", "of the results"):
        if name in missing:
            raise BrokenPrimitive(f"{named(prototype)}: '{name}' is missing, the names {what}")
    if functions[0] in missing:
        raise BrokenPrimitive(
            f"{named(prototype)}: '{functions[0]}' is missing, the function that makes the results"
        )


def misspelt(name: str, meant: Collection[str]) -> str | None:
    """Which of some names was meant; None if this is a name of its own."""
    lower = name.lower().strip("_")
    for other in meant:
        if lower == other or len(other) == 3 and sorted(lower) == sorted(other):
            return other
    close = get_close_matches(lower, meant, n=1, cutoff=0.85)
    return close[0] if close else None


def check_names(prototype: Any, spec: Mapping[str, Any], which: str) -> None:
    """Complain about what cannot be the name of an argument or result."""
    for name in spec:
        if not isinstance(name, str) or not name.isidentifier():
            raise BrokenPrimitive(
                f"{named(prototype)}: {name!r} in '{which}' is no name; several names are separated by commas"
            )


def check_functions(prototype: Any, ain: Mapping[str, Any], aout: Mapping[str, Any]) -> None:
    """Complain about functions that do not take what they have to."""
    check_names(prototype, ain, "ain")
    check_names(prototype, aout, "aout")
    found = {kind: getattr(prototype, kind) for kind in FUNCTIONS if hasattr(prototype, kind)}
    functions = {kind: f for kind, f in found.items() if callable(f) or kind != "hvp"}
    parameters = {kind: read_parameters(prototype, kind, f) for kind, f in functions.items()}
    # Say which names there are, and which are needed
    arguments, takes_any = parameters["apl"]
    cotangents, tangents = ["_" + name for name in aout], [name + "_" for name in ain]
    known = {*arguments[1:], *ain, *aout, *cotangents, *tangents}
    needed = {"apl": list(ain), "rcd": [] if takes_any else [*arguments[1:], *aout]}
    factors = {"vjp": [cotangents], "jvp": [tangents], "hvp": [cotangents, tangents]}
    for kind, (names, takes_any) in parameters.items():
        check_node(prototype, kind, names, known)
        if not takes_any:
            check_needed(prototype, kind, names, needed.get(kind, ()))
            for factor in factors.get(kind, ()):
                check_factor(prototype, kind, names, factor)


def check_node(prototype: Any, kind: str, names: Signature, known: Collection[str]) -> None:
    """Complain about a function whose first parameter is not the node."""
    if not names or names[0] in known or "node" in names[1:]:
        raise BrokenPrimitive(
            f"{named(prototype)}: the first parameter of {kind}({', '.join(names)}) has to be the node, "
            f"as in {kind}(node, ...)"
        )


def check_needed(prototype: Any, kind: str, names: Signature, needed: Iterable[str]) -> None:
    """Complain about a function that lacks a parameter."""
    for name in needed:
        if name not in names:
            raise BrokenPrimitive(
                f"{named(prototype)}: {kind}({', '.join(names)}) has no parameter for {name!r}"
                + did_you_mean(name, names[1:])
            )


def read_parameters(prototype: Any, kind: str, function: Callable[..., Any]) -> tuple[Signature, bool]:
    """The names of the parameters of a function, and whether it takes any other name, too."""
    if not callable(function):
        raise BrokenPrimitive(f"{named(prototype)}: {kind} is {function!r}, and has to be a function")
    if inspect.isgeneratorfunction(function) or inspect.iscoroutinefunction(function):
        raise BrokenPrimitive(
            f"{named(prototype)}: {kind} yields its results or waits for them; it has to return them"
        )
    parameters = inspect.signature(function).parameters.values()
    names = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
    return names, any(p.kind is p.VAR_KEYWORD for p in parameters)


def check_factor(prototype: Any, kind: str, names: Signature, factor: Collection[str]) -> None:
    """Complain about a derivative that takes none of the cotangents (or tangents), but what looks like one."""
    if not factor or not set(factor).isdisjoint(names):
        return
    bare = {name.strip("_") for name in factor}
    others = [name for name in names[1:] if name.strip("_") in bare or name[0] == "_" or name[-1] == "_"]
    if others or kind == "hvp":
        raise BrokenPrimitive(
            f"{named(prototype)}: {kind}({', '.join(names)}) takes none of {', '.join(map(repr, factor))}, so that "
            f"what it returns would not depend on it" + did_you_mean(others[0] if others else "", factor)
        )


def watched(primitive: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of an operator, which also complains about what it was not given, and about what it returns."""

    @wraps(function)
    def call(node: Any, *args: Any, **kwargs: Any) -> Any:
        if primitive.operator.extras:
            check_recorded(primitive, {**dict(zip(primitive.argnames, args)), **kwargs})
        result = function(node, *args, **kwargs)
        if type(result) is dict:
            for value in result.values():
                if type(value) not in USUAL:
                    return check_result(primitive, result)
            return result
        return result if type(result) in USUAL else check_result(primitive, result)

    return call


USUAL = {ndarray, float64, float}  # types of which nothing has to be asked


def check_result(primitive: Any, result: Any) -> Any:
    """What a function returned, or an error if it cannot be meant."""
    names = primitive.outnames
    if result is None and names:
        raise misbehaves(primitive, "returned nothing; is a 'return' missing?")
    if isinstance(result, tuple) and len(result) == 1 and isinstance(result[0], dict):
        raise misbehaves(primitive, "returned a tuple that holds a dict; is there a comma behind it?")
    if isinstance(result, dict):
        values = result = dict(result)
    else:
        values = {name: result for name in names if len(names) == 1}
    for name, value in values.items():
        if isinstance(value, NO_VALUES) or primitive.kind != "apl" and isinstance(value, NO_DERIVATIVES):
            raise misbehaves(primitive, f"returned {name!r} as {type(value).__name__}, which is no value")
    return result


NO_VALUES = GeneratorType, map, filter, zip
NO_DERIVATIVES = NoneType, set, frozenset, FunctionType, type


class NotRecorded:
    """In the place of what a derivative takes and nobody recorded. It is an error for the derivative, if it is called."""

    def __init__(self, found: Iterable[str]) -> None:
        self.found = list(found)

    def __repr__(self) -> str:
        return "not recorded"


def check_recorded(primitive: Any, given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if type(value) is NotRecorded:
            raise BrokenPrimitive(
                f"{named(primitive.operator.prototype)}: {primitive.kind} takes '{name}', which has not been recorded; "
                f"recorded are the arguments and what apl returned, {value.found}"
            )


def misbehaves(primitive: Any, what: str) -> ExecutionError:
    """The error for a function that did what it must not."""
    return ExecutionError(f"{primitive.kind} of {named(primitive.operator.prototype)}, {what}")
