"""Tapes: what a run leaves behind for its derivatives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .autodiff import derive
from .execution import collect
from .graph import Node
from .operator import ZeroGradient
from .symbol import Value

if TYPE_CHECKING:
    from .execution import Plan
    from .model import Model


class Record:
    """What one node recorded: the node, and values by name in `impl_kwargs`."""

    def __init__(self, node: Node, impl_kwargs: dict[str, Value]) -> None:
        self.node = node
        self.impl_kwargs = impl_kwargs

    def __repr__(self) -> str:
        return f"{self.node!r} recorded {', '.join(self.impl_kwargs) or 'nothing'}"


class Tape(Sequence[Record]):
    """The record of a run of a model: a sequence of `Record`, one for each node that ran.

    Attributes
    ----------
    model : Model
    out : dict
        The outputs of the run.
    """

    def __init__(
        self, model: Model, plan: Plan, slots: list[Value], init: Iterable[str], out: dict[str, Value]
    ) -> None:
        self.model = model
        self.plan = plan
        self.slots = slots
        self.init = tuple(init)
        self.out = out

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
        """The second-order sweep as a model: from tangents `x_` of the inputs, cotangents `_y` of the outputs and (zero if left
        out) their tangents `_y_`, to the cotangents `_x` of the inputs and their tangents `_x_`.

        Raises
        ------
        BrokenPrimitive
            An operator does not offer its `hvp`.
        """
        model = derive(self.plan, self.model, "hvp").on(self)
        model._optional = {f"_{name}_": ZeroGradient for name in self.plan.vout}
        return model

    def get_hvp_vout(self) -> list[str]:
        """The names of the tangents of the cotangents of the inputs, in the order in which their values were given."""
        return [f"_{name}_" for name in self.init]
