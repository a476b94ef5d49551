"""Tapes: what a run leaves behind for its derivatives."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .autodiff import derive
from .execution import ConsumedTape, collect, describe
from .graph import Node, clip, fold, in_bytes
from .operator import ZeroGradient
from .symbol import BaseSymbol, Literal, Value
from .valuetypes import form_of, nbytes_of

if TYPE_CHECKING:
    from .execution import Plan
    from .model import Model


class Record:
    """What one node recorded: the node, and values by name in `impl_kwargs`."""

    def __init__(self, node: Node, impl_kwargs: dict[str, Value]) -> None:
        self.node = node
        self.impl_kwargs = impl_kwargs

    def __repr__(self) -> str:
        values = ", ".join(f"{name}: {describe(value)}" for name, value in self.impl_kwargs.items())
        return f"{self.node!r} recorded {values or 'nothing'}"


class Tape(Sequence[Record]):
    """The record of a run of a model: a sequence of `Record`, one for each node that ran.

    Attributes
    ----------
    model : Model
    out : dict
        The outputs of the run, or their forms after `let_go`.
    private : bool
        Whether nobody outside of the engine has the tape.
    """

    def __init__(
        self, model: Model, plan: Plan, slots: list[Value], init: Mapping[str, Value], out: dict[str, Value]
    ) -> None:
        self.model = model
        self.plan = plan
        self.slots = slots
        self.init = tuple(init)
        self.out = out
        self.forms = {name: form_of(value) for name, value in init.items()}
        self.private = True

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

    # How a tape shows itself
    def held(self) -> list[dict[str, Value]]:
        """What the nodes recorded."""
        return [record.impl_kwargs for record in self]

    @property
    def nbytes(self) -> int:
        """The bytes of all arrays that the tape holds on this rank, each counted once."""
        return nbytes_of(self.held(), {})

    def _repr_html_(self) -> str:
        return self._table([NESTED])

    def _table(self, budget: list[int]) -> str:
        looks = self._looks()
        seen: dict[int, Any] = {}
        sizes = [nbytes_of(values, seen) for values in self.held()]

        def show(name: str, symbol: BaseSymbol) -> str:
            text = f"{symbol!r}: {looks[symbol]}" if symbol in looks else repr(symbol)
            return f"{html.escape(name)} = <code>{html.escape(clip(text))}</code>"

        def cells(i: int) -> list[str]:
            # Write the row of a node on a tape
            node, values = self.plan.nodes[i], self[i].impl_kwargs
            filename, line = node.place
            recorded = []
            for name, value in values.items():
                if isinstance(value, Tape) and budget[0] > 0:
                    budget[0] -= 1
                    recorded.append(value._table(budget))
                else:
                    recorded.append(html.escape(f"{name}: {clip(describe(value))}"))
            return [
                html.escape(node.name),
                "<br>".join(show(name, symbol) for name, symbol in node.arguments.items()),
                "<br>".join(show(name, symbol) for name, symbol in node.varout.items()),
                "<br>".join(recorded),
                in_bytes(sizes[i]) if sizes[i] else "",
                html.escape(f"{os.path.basename(filename)}:{line}"),
            ]

        summary = f"{self!r}, {in_bytes(sum(sizes))} recorded"
        columns = "node", "inputs", "results", "recorded", "bytes", "built at"
        return fold(summary, columns, range(len(self)), cells)

    def _looks(self) -> dict[BaseSymbol, str]:
        """What is known of the values of symbols: of inputs, outputs, and what somebody recorded."""
        looks: dict[BaseSymbol, str] = {}
        for node, record in self.plan.records.items():
            symbols = {**node.varout, **node.varin}
            for name, target in record.items() if type(record) is dict else ():
                if name in symbols and symbols[name] not in looks:
                    looks[symbols[name]] = describe(collect(self.slots, target))
        for name, symbol in self.model._inputs.items():
            form = self.forms.get(name)
            if form is not None:
                looks[symbol] = f"list of {len(form)}" if type(form) is list else str(form)
        looks.update((self.model._outputs[name], describe(value)) for name, value in self.out.items())
        return {symbol: look for symbol, look in looks.items() if not isinstance(symbol, Literal)}

    def let_go(self) -> dict[str, Value]:
        """The outputs, of which the tape keeps from now on only the forms, and what nodes recorded."""
        out = self.out
        self.out = {name: form_of(value) for name, value in out.items()}
        for slot in self.plan.unrecorded:
            self.slots[slot] = None
        return out

    def consume(self) -> None:
        """Let the next sweep, which is the last, drop what it does not need any more; if the tape is private."""
        if self.private:
            self.slots = ConsumedTape(self.slots)

    def get_vjp(self) -> Model:
        """The vector-Jacobian product as a model: from the inputs `_y` to the outputs `_x`."""
        return derive(self.plan, self.model, "vjp").on(self)

    def get_jvp(self) -> Model:
        """The Jacobian-vector product as a model: from the inputs `x_` to the outputs `y_`."""
        return derive(self.plan, self.model, "jvp").on(self)

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

    def get_hvp(self) -> Model:
        """The second-order sweep as a model.

        Its inputs are the tangents `x_` of the inputs, the cotangents `_y` of the outputs and (zero if left
        out) their tangents `_y_`; its outputs the cotangents `_x` of the inputs and their tangents `_x_`.

        Raises
        ------
        BrokenPrimitive
            An operator does not offer its `hvp`.
        """
        model = derive(self.plan, self.model, "hvp").on(self)
        model._optional = {f"_{name}_": ZeroGradient for name in self.plan.vout}
        return model

    def get_hvp_vout(self) -> list[str]:
        """The names of the tangents of the inputs' cotangents, in the order in which values were given."""
        return [f"_{name}_" for name in self.init]


NESTED = 30  # how many inner tapes are written out in the table of a tape
