"""Tapes: what a run leaves behind for its derivatives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, ClassVar, Protocol

from .error import BadArgument
from .execution import Plan, collect, describe
from .graph import Node, Symbols
from .operator import ZeroGradient
from .symbol import Symbol, Value


# What tangents look like
class Form:
    """The looks of a value: type, shape and dtype, and for a distributed field the shape of the whole."""

    __slots__ = "kind", "shape", "dtype", "whole"

    def __init__(self, value: Value) -> None:
        self.kind = type(value)
        self.shape = () if isinstance(value, (int, float, complex)) else getattr(value, "shape", None)
        self.dtype = getattr(value, "dtype", None)
        whole = getattr(value, "cshape", None)
        self.whole = None if whole is None else tuple(map(int, whole))

    def __str__(self) -> str:
        if not self.shape and self.dtype is None:
            return "a number" if self.shape == () else f"an object of type {self.kind.__name__}"
        whole = f" of {list(self.whole)}" if self.whole else ""
        return f"{self.kind.__name__} {self.dtype}{list(self.shape or ())}{whole}"


def form_of(value: Value) -> Any:
    """The Form of a value, or the list of those of its items."""
    if type(value) in (list, tuple):
        return [form_of(item) for item in value]
    return value if type(value) is Form else Form(value)


def conform(name: str, derivative: Value, form: Any) -> Value:
    """A tangent or cotangent for a value of some form; raises BadArgument if it does not fit."""
    if derivative is ZeroGradient:
        return derivative
    given = form_of(derivative)
    if type(form) is list:
        if type(given) is not list or len(given) != len(form):
            raise BadArgument(f"'{name}' is {describe(derivative)}, and belongs to a list of {len(form)}")
        return [conform(f"{name}[{i}]", item, part) for i, (item, part) in enumerate(zip(derivative, form))]
    if form.shape is None:
        return derivative  # of a type that we know nothing about
    if (
        type(given) is list
        or given.shape != form.shape
        or ((given.whole or form.whole) != (form.whole or given.whole))
    ):
        # Take a number for an array, or complain
        if type(given) is not list and given.shape == () and form.kind.__name__ == "ndarray":
            import numpy

            exact = form.dtype.kind not in "fc"
            dtype = numpy.result_type(float if exact else form.dtype, derivative)
            return numpy.full(form.shape, derivative, dtype)
        raise BadArgument(f"'{name}' is {describe(derivative)}, and belongs to a value that is {form}")
    return derivative


# Slots of a tape that is consumed
class ConsumedTape(list[Value]):
    """The slots of a tape that is used for the last time."""


class Record:
    """What one node recorded: the node, and values by name in `impl_kwargs`."""

    _repr_html_: ClassVar[Callable[..., str]]

    def __init__(self, node: Node, impl_kwargs: dict[str, Value]) -> None:
        self.node = node
        self.impl_kwargs = impl_kwargs

    def __repr__(self) -> str:
        values = ", ".join(f"{name}: {describe(value)}" for name, value in self.impl_kwargs.items())
        return f"{self.node!r} recorded {values or 'nothing'}"


class Derivable(Protocol):
    """What a tape needs of the model that was run."""

    _inputs: dict[str, Symbol]
    _outputs: Symbols

    def derive(self, plan: Plan, kind: str) -> Any:
        """The model of a derivative, 'vjp', 'jvp' or 'hvp', for all runs of a recording plan."""


class Tape(Sequence[Record]):
    """The record of a run of a model: a sequence of `Record`, one for each node that ran.

    How it looks in a notebook comes from `core.draw`.

    Attributes
    ----------
    model : Model
    out : dict
        The outputs of the run, or their forms after `let_go`.
    shared : bool
        Whether somebody outside of the engine has the tape.
    """

    _repr_html_: ClassVar[Callable[..., str]]

    def __init__(
        self,
        model: Derivable,
        plan: Plan,
        slots: list[Value],
        init: Mapping[str, Value],
        out: dict[str, Value],
    ) -> None:
        self.model = model
        self.plan = plan
        self.slots = slots
        self.init = tuple(init)
        self.out = out
        self.forms = {name: form_of(value) for name, value in init.items()}
        self.shared = False

    def __len__(self) -> int:
        return len(self.plan.nodes)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        node = self.plan.nodes[i]
        record = self.plan.records.get(node, {})
        if type(record) is int:
            return Record(node, self.slots[record])
        return Record(node, {name: collect(self.slots, target) for name, target in record.items()})

    def __repr__(self) -> str:
        return f"tape of {self.model!r}"

    # What a tape holds
    def held(self) -> list[dict[str, Value]]:
        """What the nodes recorded."""
        return [record.impl_kwargs for record in self]

    @property
    def nbytes(self) -> int:
        """The bytes of all arrays that the tape holds on this rank, each counted once."""
        return nbytes_of(self.held(), {})

    def let_go(self) -> dict[str, Value]:
        """The outputs, of which the tape keeps from now on only the forms, and what nodes recorded."""
        out = self.out
        self.out = {name: form_of(value) for name, value in out.items()}
        for slot in self.plan.unrecorded:
            self.slots[slot] = None
        return out

    def consume(self) -> None:
        """Let the next sweep, which is the last, use up the tape; unless somebody outside of the engine has it."""
        if not self.shared:
            self.slots = ConsumedTape(self.slots)

    def get_vjp(self) -> Any:
        """The vector-Jacobian product as a `Model`: from the inputs `_y` to the outputs `_x`."""
        return self.model.derive(self.plan, "vjp").on(self)

    def get_jvp(self) -> Any:
        """The Jacobian-vector product as a `Model`: from the inputs `x_` to the outputs `y_`."""
        return self.model.derive(self.plan, "jvp").on(self)

    def get_vjp_vout(self) -> list[str]:
        """The names of the cotangents of the inputs, in the order in which their values were given."""
        return ["_" + name for name in self.init]

    def get_jvp_vout(self) -> list[str]:
        """The names of the tangents of the outputs."""
        return [name + "_" for name in self.out]

    def compute_jvjp(self, vout: str | list[str], aout: list[str], init: Mapping[str, Value]) -> Any:
        """The product J^T J v: push the tangents `init` of inputs forward to the outputs `aout`, and
        pull them back to `vout`.

        Parameters
        ----------
        vout : str or list of str
            Names of cotangents of inputs, `_x`.
        aout : list of str
            Names of outputs, `y`.
        init : dict
            Tangents of inputs, `x_`.
        """
        tangents = self.get_jvp().compute([name + "_" for name in aout], init)
        return self.get_vjp().compute(vout, {"_" + name: tangent for name, tangent in zip(aout, tangents)})

    def get_hvp(self) -> Any:
        """The second-order sweep as a `Model`.

        Its inputs are the tangents `x_` of the inputs, the cotangents `_y` of the outputs and (zero if left
        out) their tangents `_y_`; its outputs the cotangents `_x` of the inputs and their tangents `_x_`.

        Raises
        ------
        BrokenPrimitive
            An operator does not offer its `hvp`.
        """
        model = self.model.derive(self.plan, "hvp").on(self)
        model._optional = {f"_{name}_": ZeroGradient for name in self.plan.vout}
        return model

    def get_hvp_vout(self) -> list[str]:
        """The names of the tangents of the inputs' cotangents, in the order in which values were given."""
        return [f"_{name}_" for name in self.init]


def nbytes_of(value: Value, seen: MutableMapping[int, Any]) -> int:
    """The bytes of the arrays that a value holds on this rank, without those that were `seen` before.

    Looks into lists and dicts, distributed fields (their `value`), objects that tell what they have in a
    method `held`, and, for all other objects, at the arrays among their attributes. Adds what it finds to
    `seen`.
    """
    kind = type(value)
    if kind in (int, float, complex, str, bool, type(None)):
        return 0
    if kind in (list, tuple):
        return sum(nbytes_of(item, seen) for item in value)
    if kind is dict:
        return sum(nbytes_of(item, seen) for item in value.values())
    # Weigh an array
    if is_array(value):
        owner = value
        while getattr(owner, "base", None) is not None:
            owner = owner.base
        if seen.get(id(owner)) is owner:
            return 0
        try:
            seen[id(owner)] = owner
        except TypeError:
            pass
        size = getattr(owner, "nbytes", value.nbytes)
        return int(size)
    if hasattr(kind, "held"):
        return nbytes_of(value.held(), seen)
    if is_array(getattr(value, "value", None)):
        return nbytes_of(value.value, seen)
    attributes = {} if isinstance(value, type) else getattr(value, "__dict__", {})
    return sum(nbytes_of(part, seen) for part in attributes.values() if is_array(part))


def is_array(value: Value) -> bool:
    return isinstance(getattr(value, "nbytes", None), int) and hasattr(value, "shape")
