"""Standard operators. With this module symbols gain their arithmetic."""

from collections.abc import Callable
from typing import Any, NoReturn

import numpy

from ..error import BadArgument
from ..symbol import BaseSymbol
from .numpy_calls import answers, by_method, refuse_strangers
from .operators import abs, add, div, mod, mul, neg, pos, pow, sub
from .utils import assert_isinstance, assert_true, eval, terminal, watchpoint

__all__ = [
    "pos",
    "neg",
    "abs",
    "add",
    "sub",
    "mul",
    "div",
    "mod",
    "pow",
    "eval",
    "watchpoint",
    "assert_isinstance",
    "assert_true",
    "terminal",
]


def _unary(operator: Any) -> Callable[..., Any]:
    return lambda self: operator(self)


def _binary(operator: Any) -> Callable[..., Any]:
    def method(self: BaseSymbol, other: Any) -> Any:
        refuse_strangers(other)
        return operator(self, other)

    return method


def _reflected(operator: Any) -> Callable[..., Any]:
    def method(self: BaseSymbol, other: Any) -> Any:
        refuse_strangers(other)
        return operator(other, self)

    return method


_operator: Any
for _name, _operator in [("pos", pos), ("neg", neg), ("abs", abs)]:
    setattr(BaseSymbol, f"__{_name}__", _unary(_operator))
for _name, _operator in [("add", add), ("sub", sub), ("mul", mul), ("truediv", div), ("mod", mod)]:
    setattr(BaseSymbol, f"__{_name}__", _binary(_operator))
    setattr(BaseSymbol, f"__r{_name}__", _reflected(_operator))


def _power(self: BaseSymbol, other: Any, modulo: Any = None) -> Any:
    if modulo is not None:
        raise BadArgument("pow with a modulo is not differentiable")
    refuse_strangers(other)
    return pow(self, other)


def _no_floor_division(self: BaseSymbol, other: Any) -> NoReturn:
    raise TypeError(
        "// on symbols is refused, since its derivative is zero; use x.eval(function) if that is meant"
    )


for _name, _method in dict(
    __pow__=_power,
    __rpow__=_reflected(pow),
    eval=_binary(eval),
    __floordiv__=_no_floor_division,
    __rfloordiv__=_no_floor_division,
).items():
    setattr(BaseSymbol, _name, _method)

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
