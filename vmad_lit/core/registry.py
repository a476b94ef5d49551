"""Operators that share a name, and the choice among them by the types of their operands."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from .autodiff import no_second_derivative
from .declaration import check_class
from .error import BadArgument, BrokenPrimitive
from .execution import is_zero
from .graph import Node
from .operator import Operator, Primitive, ZeroGradient

WILDCARD = re.compile(r"\[[^]]+\]|[*?]")


def specificity(pattern: Any, x: Any) -> tuple[int, int, int] | None:
    """How far a pattern is from the type of `x`, as (characters that wildcards match, wildcards,
    steps to a base class); None if not."""
    bases = type(x).__mro__[:-1] or (object,)
    if isinstance(pattern, type):
        if not isinstance(x, pattern):
            return None
        return 0, 0, bases.index(pattern) if pattern in bases else len(bases)
    wildcards = len(WILDCARD.findall(pattern))
    literal = len(WILDCARD.sub("", pattern))
    for steps, cls in enumerate(bases):
        if fnmatchcase(cls.__name__, pattern):
            return len(cls.__name__) - literal if wildcards else 0, wildcards, steps
    return None


class Entry(NamedTuple):
    """An operator, and the patterns of the operands that it can work on."""

    operator: Any
    patterns: dict[str, Any]

    def score(self, operands: Mapping[str, Any]) -> tuple[int, ...] | None:
        """How well the operands fit, as a tuple, the smaller the better; None if they do not."""
        total: tuple[int, ...] = (0, 0, 0)
        for name, pattern in self.patterns.items():
            fit = specificity(pattern, operands[name]) if name in operands else None
            if fit is None:
                return None
            total = tuple(a + b for a, b in zip(total, fit))
        return (len(operands) - len(self.patterns), *total)


class Registry:
    """Operators by name, each with patterns for its operands."""

    def __init__(self) -> None:
        self._entries: dict[str, list[Entry]] = {}

    def register(
        self, operator: Any, patterns: Mapping[str, Any] | None = None, name: str | None = None
    ) -> None:
        """Add an operator.

        Parameters
        ----------
        operator : Operator, or any object
        patterns : dict, optional
            From names of operands to patterns: a type, or a str that is matched with the name of a
            type or of a base of it, with the wildcards of `fnmatch`. The default is the declaration
            `ain` of the operator.
        name : str, optional
            The name under which it is found; the default is that of the operator.
        """
        patterns = dict(operator.ain if patterns is None else patterns)
        self._entries.setdefault(name_of(operator, name), []).append(Entry(operator, patterns))

    def operators(self, operator: Any) -> list[Any]:
        """All operators of a name."""
        return [entry.operator for entry in self._entries.get(name_of(operator), [])]

    def match_all(self, operator: Any, operands: Mapping[str, Any], name: str | None = None) -> list[Entry]:
        """All entries of a name whose patterns fit the operands, a dict from names to values; the
        best first, of equals the latest."""
        entries = reversed(self._entries.get(name_of(operator, name), []))
        scored = [(score, entry) for entry in entries if (score := entry.score(operands)) is not None]
        return [entry for _, entry in sorted(scored, key=lambda pair: pair[0])]

    def match(self, operator: Any, operands: Mapping[str, Any], name: str | None = None) -> Any:
        """The operator of a name that fits the operands best; KeyError if there is none."""
        found = self.match_all(operator, operands, name)
        if not found:
            # Complain that no operator fits
            key = name_of(operator, name)
            types = ", ".join(f"{arg}: {type(x).__name__}" for arg, x in operands.items())
            known = "; ".join(str(entry.patterns) for entry in self._entries.get(key, [])) or "none"
            raise KeyError(f"no operator '{key}' is registered for ({types}); known patterns are {known}")
        return found[0].operator


def name_of(operator: Any, name: str | None = None) -> str:
    """The name of an operator, which may be given itself."""
    if name is not None:
        return name
    return operator if isinstance(operator, str) else operator.__name__


RECORD = "record of the choice"


class OverloadedOperator(Operator):
    """An operator that leaves its work to one of several, by the types of its inputs at run time.

    Attributes
    ----------
    default : Operator
        The one that is chosen if no registered operator fits.
    registry : Registry
    """

    def __init__(self, prototype: Any) -> None:
        check_class(prototype)
        self.default = Operator(prototype)
        self.registry = Registry()
        self._choices: dict[tuple[type, ...], Any] = {}
        super().__init__(prototype)

    def _make_primitives(self) -> None:
        apl, trusted, self.trusted = self.default.apl, self.trusted, True
        self.apl = Primitive(self, "apl", self._apply, apl.argnames, self._apply_and_record)
        self.apl.defaults = apl.defaults
        self.vjp = Primitive(self, "vjp", self._pull_back, [RECORD, *("_" + name for name in self.aout)])
        self.jvp = Primitive(self, "jvp", self._push_forward, [RECORD, *(name + "_" for name in self.ain)])
        of_vjp = *("_" + name for name in self.aout), *(name + "_" for name in self.ain)
        self.hvp = Primitive(self, "hvp", self._differentiate_vjp, [RECORD, *of_vjp])
        self.rcd = None
        self.trusted = trusted
        self._find_recorded()

    def register(self, operator: Any = None, /, **patterns: Any) -> Any:
        """Add an operator for some types of inputs.

        Parameters
        ----------
        operator : Operator
            It has the same inputs and outputs as this one. Its other arguments are among those of this one.
        **patterns
            Patterns for the inputs, as in `Registry.register`; the default is the declaration `ain`
            of the operator.

        Without an operator it is a decorator.
        """
        if operator is None:
            return lambda operator: self.register(operator, **patterns)
        # Check that the operator can stand in for this one
        if list(operator.ain) != list(self.ain) or list(operator.aout) != list(self.aout):
            raise BadArgument(f"{operator!r} cannot stand in for {self!r}: inputs and outputs differ")
        extra = [name for name in operator.apl.argnames if name not in self.apl.argnames]
        if extra:
            raise BadArgument(f"{operator!r} cannot stand in for {self!r}, which has no argument {extra}")
        self.registry.register(operator, patterns or None, name=self.__name__)
        self.collective = self.collective or operator.collective
        self.trusted = self.trusted and operator.trusted
        self._choices.clear()
        return operator

    def choose(self, arguments: Mapping[str, Any]) -> Any:
        """The operator for a dict of values of all arguments."""
        types = tuple(type(arguments[name]) for name in self.ain)
        choice = self._choices.get(types)
        if choice is None:
            found = self.registry.match_all(self.__name__, {name: arguments[name] for name in self.ain})
            choice = self._choices[types] = found[0].operator if found else self.default
        return choice

    def _split(self, arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The choice, and those of the arguments that it takes; complain about others unless they
        have their default value."""
        choice = self.choose(arguments)
        known = choice.apl.argnames
        if len(known) < len(self.apl.argnames):
            for name, value in arguments.items():
                if name not in known and value is not self.apl.defaults.get(name):
                    types = ", ".join(type(arguments[name]).__name__ for name in self.ain)
                    raise BadArgument(
                        f"{self.__name__} of a {types} takes no argument '{name}'; given was {value!r}"
                    )
            arguments = {name: arguments[name] for name in known}
        return choice, arguments

    def _apply(self, node: Any, **arguments: Any) -> Any:
        choice, arguments = self._split(arguments)
        return choice.apl.impl(twin_of(node, choice.apl), **arguments)

    def _apply_and_record(self, node: Any, **arguments: Any) -> Any:
        choice, arguments = self._split(arguments)
        twin = twin_of(node, choice.apl)
        result = choice.apl.recording_call(twin, *(arguments[name] for name in choice.apl.argnames))
        if not isinstance(result, dict):
            result = dict.fromkeys(choice.aout, result)
        everything = {**result, **arguments}
        if choice.rcd is not None:
            kept = choice.rcd(twin, **everything)
        else:
            kept = {name: everything[name] for name in choice.recorded if name in everything}
        return {**result, RECORD: (choice, kept)}

    def _pull_back(self, node: Any, **arguments: Any) -> Any:
        choice, kept = arguments.pop(RECORD, (self.default, {}))
        if choice.vjp is None:
            raise BrokenPrimitive(f"{choice!r} has no vjp, and a gradient is wanted through {node!r}")
        return call(choice.vjp, node, {**kept, **arguments})

    def _push_forward(self, node: Any, **arguments: Any) -> Any:
        choice, kept = arguments.pop(RECORD, (self.default, {}))
        return call(choice.jvp, node, {**kept, **arguments})

    def _differentiate_vjp(self, node: Any, **arguments: Any) -> Any:
        choice, kept = arguments.pop(RECORD, (self.default, {}))
        if choice.hvp is None:
            raise no_second_derivative(choice, node)
        return call(choice.hvp, node, {**kept, **arguments}) if choice.hvp else ZeroGradient


def overloaded(prototype: Any) -> Any:
    """Declare an operator, as by `operator`, to which others can be added for other types, by its
    method `register`."""
    return OverloadedOperator(prototype)


def call(primitive: Primitive, node: Any, available: Mapping[str, Any]) -> Any:
    """Call a derivative of the chosen operator, unless it is known to be zero; a collective one is
    called in any case."""
    if not primitive.operator.collective and any(
        all(is_zero(available[name]) for name in factor if name in available) for factor in primitive.factors
    ):
        return ZeroGradient
    given = {name: available[name] for name in primitive.argnames if name in available}
    return primitive.impl(twin_of(node, primitive), **given)


def twin_of(node: Node | None, primitive: Primitive) -> Node | None:
    """A node like the given one, of a primitive of the chosen operator."""
    if node is None:
        return None
    original = node.forward or node
    if original.cache is None:
        original.cache = {}
    key = primitive.operator, id(node.placed)
    twin: Node | None = original.cache.get(key)
    if twin is None:
        operator = primitive.operator
        twin = Node(operator.apl, original.varin, original.varout, original._origin, placed=node.placed)
        twin.number = original.number
        original.cache[key] = twin
    if primitive.kind == "apl":
        return twin
    return Node(primitive, node.varin, node.varout, None, twin, node.placed)
