"""What the functions of NumPy and of Python do with symbols: build nodes where there are operators, and refuse to guess."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import numpy

from ..error import NoValueYet
from ..symbol import BaseSymbol, List, Symbol, Value

Call = Any  # a function of NumPy, or the pair of a ufunc and the name of one of its methods
Builder = Callable[..., Any]

BUILDERS: dict[Call, Builder] = {}  # what makes the nodes for a call of NumPy
INSTEAD: dict[Call, str] = {}  # what to write in the place of a call that has no operator


def answers(*calls: Call) -> Callable[[Any], Any]:
    """Decorate a function that builds the nodes for a call of NumPy.

    It has the parameters of the function of NumPy, in their order, and may leave out the last ones. Those
    whose annotation is `Unsupported` are there for the order, and have to be left at their defaults.
    """

    def register(builder: Builder) -> Builder:
        BUILDERS.update(dict.fromkeys(calls, builder))
        return builder

    return register


Unsupported = Any


def call_function(function: Any, args: Any, kwargs: Any) -> Any:
    """Build the nodes for a call of a function of NumPy; NoValueYet if there is no operator, or not for these arguments."""
    builder = BUILDERS.get(function)
    if builder is None:
        raise no_operator(function)
    signature = inspect.signature(builder)
    try:
        given = signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        raise NoValueYet(f"{name_of(function)} of a symbol: {error}") from None
    # Refuse an argument that is not supported
    for name, value in given.items():
        parameter = signature.parameters[name]
        if parameter.annotation == "Unsupported" and value is not parameter.default:
            raise NoValueYet(
                f"{name_of(function)} of a symbol takes no argument '{name}'; given was {value!r}"
            )
    return builder(*args, **kwargs)


def call_ufunc(ufunc: Any, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Build the nodes for a call of a ufunc, or of one of its methods, as `call_function` does for functions."""
    if method != "__call__":
        return call_function((ufunc, method), args, kwargs)
    if ufunc not in BUILDERS:
        raise no_operator(ufunc)
    for name in kwargs:
        # Tell that an option cannot be had
        if name == "out":
            raise NoValueYet(
                "an array cannot be changed in place by a symbol; write x = x + s instead of x += s"
            )
        raise NoValueYet(f"{name_of(ufunc)} of a symbol takes no argument '{name}'")
    return BUILDERS[ufunc](*map(operand, args))


def no_operator(call: Call) -> NoValueYet:
    """The error for a call of NumPy that has no operator."""
    name = name_of(call)
    default = (
        f"x.eval({name}) computes it when the model runs, without a derivative; for one declare an @operator"
    )
    if "." in name.removeprefix("np.").removeprefix("linalg.").removeprefix("fft."):
        default = "use x.eval(function), which has no derivative, or declare an @operator"
    return NoValueYet(
        f"{name} cannot be taken of a symbol, which has no value while the model is built, and the library has no "
        f"operator for it; {INSTEAD.get(call, default)}"
    )


def name_of(call: Call) -> str:
    """The name under which programs call a function."""
    if isinstance(call, tuple):
        return f"{name_of(call[0])}.{call[1]}"
    name = getattr(call, "__name__", repr(call))
    module = getattr(call, "__module__", None) or ("numpy" if getattr(numpy, name, None) is call else "")
    return ".".join([*filter(None, [module.replace("numpy", "np", 1)]), name])


def operand(x: Value) -> Value:
    """An operand as the operators take it: lists are arrays. Symbols in it have to be joined by the user."""
    if isinstance(x, (list, tuple, List)):
        if any(True for _ in symbols_in(x)):
            raise NoValueYet(
                "a list of symbols is no array; join them with linalg.stack or linalg.concatenate"
            )
        return numpy.asarray(x)
    refuse_strangers(x)
    return x


def symbols_in(x: Value) -> Iterable[BaseSymbol]:
    """The symbols in an object, which may be a (nested) list or an array of objects."""
    if isinstance(x, BaseSymbol) and not isinstance(x, List):
        yield x
    elif isinstance(x, (list, tuple, List)) or isinstance(x, numpy.ndarray) and x.dtype.kind == "O":
        for item in x.flat if isinstance(x, numpy.ndarray) else x:
            yield from symbols_in(item)


USUAL = {Symbol, int, float, complex, bool, numpy.float64, numpy.float32}


def refuse_strangers(x: Value) -> None:
    """Complain about operands whose arithmetic is not that of arrays, so that derivatives would miss what they mean."""
    cls = type(x)
    if cls in USUAL or cls is numpy.ndarray and x.dtype.kind != "O":
        return
    if hasattr(cls, "__pandas_priority__") and not isinstance(x, BaseSymbol):
        raise NoValueYet(f"a {cls.__name__} of pandas aligns its rows by label; give its array, x.to_numpy()")
    if not isinstance(x, numpy.ndarray):
        return
    # Refuse an array that is more than its numbers
    for name, advice in STRANGE.items():
        if hasattr(x, name):
            raise NoValueYet(f"symbols do not go together with a {cls.__name__}: {advice}")
    if isinstance(x, numpy.matrix):
        raise NoValueYet("the * of a numpy.matrix is another one than that of arrays; give numpy.asarray(x)")
    if any(True for _ in symbols_in(x)):
        raise NoValueYet(
            "an array of symbols is no operand; join them with linalg.stack or linalg.concatenate"
        )


STRANGE = dict(
    mask="a derivative knows nothing of its mask; fill it, x.filled(0.0), and use linalg.where or a sum with where=~x.mask",
    unit="a derivative knows nothing of its unit; give a plain array, x.to_value(unit)",
)


# Where NumPy and Python ask
def by_method(name: str) -> Builder:
    """A builder that calls a method of the symbol, the reflected one if the symbol is on the right."""

    def build(x1: Any, *x2: Any) -> Any:
        if isinstance(x1, BaseSymbol):
            return getattr(x1, f"__{name}__")(*x2)
        (right,) = x2
        return getattr(right, f"__r{name}__")(x1)

    return build


def array_ufunc(self: BaseSymbol, ufunc: Any, method: str, *args: Any, **kwargs: Any) -> Any:
    return call_ufunc(ufunc, method, args, kwargs)


def array_function(self: BaseSymbol, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
    return call_function(function, args, kwargs)


def refuse(wanted: str, instead: str) -> Callable[..., NoReturn]:
    """A method that tells what a symbol cannot give."""

    def method(self: BaseSymbol, *args: Any, **kwargs: Any) -> NoReturn:
        raise NoValueYet(
            f"the symbol '{self!r}' has no value while the model is built, and so {wanted}; {instead}"
        )

    return method


AT_RUN_TIME = "decide at run time inside an operator, or with x.eval(function), which has no derivative"

METHODS: dict[str, Any] = {
    "__array_ufunc__": array_ufunc,
    "__array_function__": array_function,
    "__pandas_priority__": 10000,  # pandas leaves `series * symbol` to the symbol, which refuses it
    "__array__": refuse("is no array", "join symbols with linalg.stack or linalg.concatenate"),
    "__len__": refuse("no length", AT_RUN_TIME),
    "__round__": refuse("cannot be rounded", "x.eval(np.round) does it when the model runs"),
    "__setitem__": refuse("cannot be changed in place", "choose elements with linalg.where"),
    "__delitem__": refuse("cannot be changed in place", "take elements with x[index]"),
    **dict.fromkeys(
        ["__float__", "__int__", "__complex__", "__index__"],
        refuse("is no number", "use the functions of numpy or of vmad_lit.lib in the place of those of math"),
    ),
    **dict.fromkeys(
        ["__divmod__", "__rdivmod__"],
        refuse("has no integer quotient", "x % n is differentiable, and x // n is not"),
    ),
}

for _name, _method in METHODS.items():
    setattr(BaseSymbol, _name, _method)
