"""Standard operators. With this module symbols gain their arithmetic."""

from ..error import BadArgument
from ..symbol import BaseSymbol
from .operators import abs, add, div, mod, mul, neg, pos, pow, sub
from .utils import assert_isinstance, assert_true, eval, terminal, watchpoint

__all__ = [
    *("pos", "neg", "abs", "add", "sub", "mul", "div", "mod", "pow"),
    *("eval", "watchpoint", "assert_isinstance", "assert_true", "terminal"),
]


def _unary(operator):
    return lambda self: operator(self)


def _binary(operator):
    return lambda self, other: operator(self, other)


def _reflected(operator):
    return lambda self, other: operator(other, self)


for _name, _operator in dict(pos=pos, neg=neg, abs=abs).items():
    setattr(BaseSymbol, f"__{_name}__", _unary(_operator))
for _name, _operator in dict(add=add, sub=sub, mul=mul, truediv=div, mod=mod).items():
    setattr(BaseSymbol, f"__{_name}__", _binary(_operator))
    setattr(BaseSymbol, f"__r{_name}__", _reflected(_operator))


def _power(self, other, modulo=None):
    if modulo is not None:
        raise BadArgument("pow with a modulo is not differentiable")
    return pow(self, other)


def _no_floor_division(self, other):
    raise TypeError(
        "// on symbols is refused, since its derivative is zero; use x.eval(function) if that is meant"
    )


BaseSymbol.__pow__ = _power
BaseSymbol.__rpow__ = _reflected(pow)
BaseSymbol.__floordiv__ = BaseSymbol.__rfloordiv__ = _no_floor_division
BaseSymbol.eval = _binary(eval)
