"""Standard operators. With this module symbols gain their arithmetic."""

from collections.abc import Callable
from typing import Any

from ..symbol import BaseSymbol
from .operators import add, div, mul, neg, pos, sub

__all__ = ["pos", "neg", "add", "sub", "mul", "div"]


def _unary(operator: Any) -> Callable[..., Any]:
    return lambda self: operator(self)


def _binary(operator: Any) -> Callable[..., Any]:
    def method(self: BaseSymbol, other: Any) -> Any:
        # Refuse an operand of another arithmetic
        refuse_strangers(other)
        return operator(self, other)

    return method


def _reflected(operator: Any) -> Callable[..., Any]:
    def method(self: BaseSymbol, other: Any) -> Any:
        # Refuse an operand of another arithmetic
        refuse_strangers(other)
        return operator(other, self)

    return method


def _learn(name: str, operator: Any) -> None:
    """Teach symbols an operation of two operands, from either side."""
    setattr(BaseSymbol, f"__{name}__", _binary(operator))
    setattr(BaseSymbol, f"__r{name}__", _reflected(operator))


_operator: Any
for _name, _operator in [("pos", pos), ("neg", neg)]:
    setattr(BaseSymbol, f"__{_name}__", _unary(_operator))
for _name, _operator in [("add", add), ("sub", sub), ("mul", mul), ("truediv", div)]:
    _learn(_name, _operator)

from typing import NoReturn

from ..error import BadArgument
from .operators import abs, mod, pow

__all__ += ["abs", "mod", "pow"]


def _power(self: BaseSymbol, other: Any, modulo: Any = None) -> Any:
    if modulo is not None:
        raise BadArgument("pow with a modulo is not differentiable")
    # Refuse an operand of another arithmetic
    refuse_strangers(other)
    return pow(self, other)


def _no_floor_division(self: BaseSymbol, other: Any) -> NoReturn:
    raise TypeError(
        "// on symbols is refused, since its derivative is zero; use x.eval(function) if that is meant"
    )


_learn("mod", mod)
for _name, _method in dict(
    __abs__=_unary(abs),
    __pow__=_power,
    __rpow__=_reflected(pow),
    __floordiv__=_no_floor_division,
    __rfloordiv__=_no_floor_division,
).items():
    setattr(BaseSymbol, _name, _method)

import numpy

from .numpy_calls import answers, by_method, refuse_strangers

for _call, _name in {
    numpy.add: "add",
    numpy.subtract: "sub",
    numpy.multiply: "mul",
    numpy.divide: "truediv",
    numpy.remainder: "mod",
    numpy.power: "pow",
    numpy.positive: "pos",
    numpy.negative: "neg",
    numpy.absolute: "abs",
}.items():
    answers(_call)(by_method(_name))

from .utils import assert_isinstance, assert_true, eval, terminal, watchpoint

__all__ += ["eval", "watchpoint", "assert_isinstance", "assert_true", "terminal"]

BaseSymbol.eval = _binary(eval)  # type: ignore[method-assign]
