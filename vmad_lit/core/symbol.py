"""Symbols: names for values that do not exist yet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from .error import NoValueYet, UnpackError

Value = Any  # the engine never looks into a value


class BaseSymbol:
    """Anything that may stand for a value while a model is built."""

    __slots__ = ()

    # What type checkers shall know of arithmetic
    if TYPE_CHECKING:

        def __add__(self, other: Any) -> Symbol: ...

        __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __add__
        __mod__ = __rmod__ = __matmul__ = __rmatmul__ = __getitem__ = __rpow__ = __add__

        def __pow__(self, other: Any, modulo: None = None) -> Symbol: ...
        def __floordiv__(self, other: Any) -> NoReturn: ...
        def __rfloordiv__(self, other: Any) -> NoReturn: ...
        def __neg__(self) -> Symbol: ...

        __pos__ = __abs__ = __neg__
        __lt__ = __le__ = __gt__ = __ge__ = __add__

        def eval(self, function: Any) -> Symbol: ...


class Home(Protocol):
    """Where symbols belong: a graph, or a part of one that is not finished."""

    def anchor(self, symbol: Symbol) -> None:
        """Tie a symbol to this place."""


class Symbol(BaseSymbol):
    """A name for one value in a model.

    Parameters
    ----------
    name : str
    model : Graph, optional
        The model that it belongs to; without one it belongs nowhere until a model takes it as an input or output,
        or an operator as the place for a result.
    """

    __slots__ = ("_label", "_graph")

    _label: str | tuple[Any, ...]
    _graph: Callable[[], Any] | None

    def __init__(self, name: str, model: Home | None = None) -> None:
        if not isinstance(name, str):
            raise TypeError(f"the name of a symbol is a str, got {type(name).__name__}")
        self._label = name
        self._graph = None
        if model is not None:
            model.anchor(self)

    @property
    def _name(self) -> str:
        label = self._label
        if type(label) is tuple:
            form, *ingredients = label
            label = self._label = form.format(*ingredients)
        assert isinstance(label, str)
        return label

    @property
    def _model(self) -> Any:
        """The model (or fragment of one) that the symbol belongs to, or None."""
        return None if self._graph is None else self._graph()

    @property
    def _vjp_name(self) -> str:
        return "_" + self._name

    @property
    def _jvp_name(self) -> str:
        return self._name + "_"

    def __repr__(self) -> str:
        return self._name

    def __iter__(self) -> NoReturn:
        raise UnpackError(
            f"the symbol '{self._name}' stands for one value and cannot be unpacked; "
            "an operator returns a list of symbols for a list output only if told its length: "
            "name=ListPlaceholder(n)"
        )

    def __bool__(self) -> NoReturn:
        raise NoValueYet(
            f"the symbol '{self._name}' has no truth value while the model is built; "
            "decide at run time inside an operator, for example with x.eval(function)"
        )


class Literal(BaseSymbol):
    """A constant. It takes part in execution, and not in differentiation."""

    __slots__ = ("_value",)

    def __init__(self, value: Value) -> None:
        self._value = value

    def __repr__(self) -> str:
        text = repr(self._value)
        return text if len(text) <= 40 and "\n" not in text else f"<{type(self._value).__name__}>"

    def __bool__(self) -> NoReturn:
        raise NoValueYet(
            f"the constant {self!r} has no truth value while the model is built; ask the value itself"
        )

    def __getattr__(self, name: str) -> AttrSymbol:
        if name.startswith("_"):
            raise AttributeError(name)
        return AttrSymbol(self, name)


class AttrSymbol(Literal):
    """An attribute of a literal, looked up when the model runs."""

    __slots__ = ("_parent", "_attrname")

    def __init__(self, parent: Literal, attrname: str) -> None:
        super().__init__(None)
        self._parent = parent
        self._attrname = attrname

    def __repr__(self) -> str:
        return f"{self._parent!r}.{self._attrname}"


class List(BaseSymbol):
    """A list of symbols, which stands for the list of their values."""

    __slots__ = ("_items",)

    def __init__(self, items: Iterable[Any]) -> None:
        self._items: list[BaseSymbol] = [assymbol(item) for item in items]

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, i: Any) -> Any:
        return self._items[i]

    def __iter__(self) -> Iterator[BaseSymbol]:
        return iter(self._items)

    def __contains__(self, symbol: object) -> bool:
        return any(item is symbol for item in self._items)

    def __repr__(self) -> str:
        if len(self._items) <= 8:
            return repr(self._items)
        first, last = (", ".join(map(repr, self._items[part])) for part in (slice(3), slice(-1, None)))
        return f"[{first}, ... {len(self._items) - 4} more, {last}]"


class ListPlaceholder(List):
    """A list of `n` symbols to be, given for an output to tell that it is a list and how long."""

    __slots__ = ()

    def __init__(self, n: int) -> None:
        super().__init__([Symbol(f"item-{i}") for i in range(n)])


def assymbol(value: Any) -> BaseSymbol:
    """Make a symbol out of any Python object: itself, a List, or a Literal."""
    if isinstance(value, BaseSymbol):
        return value
    if type(value) is list or type(value) is tuple:
        return Literal(nested(value)) if value and all(map(is_numeric, value)) else List(value)
    return Literal(value)


def is_numeric(value: Any) -> bool:
    """Whether a value is a number of Python, or a (nested) list of nothing but numbers."""
    if type(value) is list or type(value) is tuple:
        return all(map(is_numeric, value))
    return type(value) in (int, float, complex)


def nested(value: Any) -> Any:
    """A copy of a (nested) list, with lists for tuples; a number as it is."""
    return list(map(nested, value)) if isinstance(value, (list, tuple)) else value


class IgnoredSymbol(BaseSymbol):
    """In place of a result that nobody wants."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "ignored"


Ignored = IgnoredSymbol()


def leaves(symbol: BaseSymbol) -> Iterator[BaseSymbol]:
    """Iterate over the symbols in `symbol`, in order: itself, or the items of a (nested) List."""
    if isinstance(symbol, List):
        for item in symbol:
            yield from leaves(item)
    else:
        yield symbol
