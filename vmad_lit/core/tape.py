"""Tapes: what a run leaves behind for its derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol

from .error import BadArgument
from .execution import Plan, collect, describe
from .graph import Node, Symbols
from .marks import Mark, literals, mark, matches
from .operator import ZeroGradient
from .runs import CURRENT, Run
from .symbol import Symbol, Value
from .valuetypes import IMMUTABLE, form_of, value_type


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
    run : Run
        Where the random numbers came from.
    marks : list of tuple
        If so, for each constant the node, the argument, the value and its mark.
    """

    _repr_html_: ClassVar[Callable[..., str]]
    marks: Sequence[tuple[Node, str, Value, Mark]] = ()

    def __init__(
        self,
        model: Derivable,
        plan: Plan,
        slots: list[Value],
        init: Mapping[str, Value],
        out: dict[str, Value],
        run: Run,
    ) -> None:
        self.model = model
        self.plan = plan
        self.slots = slots
        self.init = tuple(init)
        self.out = out
        self.run = run
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
        held = self.held()
        return value_type(held).nbytes(held, {})

    def let_go(self) -> dict[str, Value]:
        """The outputs, of which the tape keeps from now on only the forms, and what nodes recorded."""
        out = self.out
        self.out = {
            name: value if isinstance(value, IMMUTABLE) else form_of(value) for name, value in out.items()
        }
        for slot in self.plan.unrecorded:
            self.slots[slot] = None
        return out

    def share(self) -> dict[str, Value]:
        """The outputs, for somebody who gets the tape as well."""
        self.shared = True
        self.mark()
        return dict(self.out)

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

    # Constants that must not change
    def literals(self) -> Iterator[tuple[Node, str, Value]]:
        """The constants of the nodes that ran, also in inner models, as `marks.literals` has them."""
        yield from literals(self.plan.nodes)
        for node, record in self.plan.records.items():
            for name in node.operator.extras if type(record) is dict else ():
                yield from getattr(self.slots[record[name]], "literals", tuple)()

    def mark(self) -> None:
        """Take marks of all constants, if somebody outside of the engine has the tape."""
        token = CURRENT.set(self.run)  # which the look at its constants belongs to
        found = list(self.literals()) if self.shared else []
        CURRENT.reset(token)
        once = {id(literal[-1]): literal for literal in reversed(found)}
        self.marks = [(*literal, mark(literal[-1])) for literal in once.values()]

    def verify(self) -> None:
        """Complain if a constant was changed in place after the run."""
        for node, name, value, before in self.marks:
            if not matches(before, mark(value)):
                filename, line = node.place
                raise BadArgument(
                    f"the value of '{name}' in {node.name} at {filename}:{line}, {describe(value)}, was changed "
                    "in place after the run of this tape; run the model again, or let it have a copy"
                )

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
