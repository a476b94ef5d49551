"""Models: graphs that can be computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Self

from .autodiff import write_sweep
from .error import BadArgument, UnexpectedOutput, did_you_mean
from .execution import Arrivals, Plan, describe
from .graph import Graph, Node
from .operator import ZeroGradient
from .symbol import Value
from .tape import Tape
from .valuetypes import conform, form_of

Names = str | list[str]  # one name asks for one value, a list for a list
Values = Mapping[str, Value] | Iterable[tuple[str, Value]]
Monitor = Callable[[Node, Any, Any, Mapping[str, Value]], object]


class Model(Graph):
    """A list of nodes with named inputs and outputs, which can be computed."""

    runner: ClassVar[Callable[..., Any]] = staticmethod(Plan.run)

    def find_arrivals(self, init: Mapping[str, Value], placed: Mapping[str, Any] | None) -> Arrivals:
        """Where the values of inputs live, as far as it is known. On one rank there is nothing to know."""
        return ()

    def __init__(self) -> None:
        super().__init__()
        self._plans: dict[Any, Plan] = {}
        self._base: Plan | None = None
        self._kind = "apl"
        self._tape: Tape | None = None
        self._optional: dict[str, Value] = {}

    def _plan(
        self,
        vout: tuple[str, ...],
        record: bool,
        reuse: bool,
        donated: tuple[str, ...] = (),
        results: bool = True,
        arrivals: Arrivals = (),
    ) -> Plan:
        key = vout, record, reuse, donated, results, arrivals, len(self), len(self._outputs)
        plan = self._plans.get(key)
        if plan is None:
            for name in vout:
                if name not in self._outputs:
                    raise UnexpectedOutput(
                        f"the model has no output '{name}'" + did_you_mean(name, list(self._outputs))
                    )
            plan = self._plans[key] = Plan(self, vout, record, reuse, self._base, donated, results, arrivals)
        return plan

    def _run(
        self,
        vout: Iterable[str],
        init: dict[str, Value],
        record: bool = False,
        monitor: Monitor | None = None,
        donated: tuple[str, ...] = (),
        results: bool = True,
        placed: Mapping[str, Any] | None = None,
    ) -> tuple[dict[str, Value], Any]:
        """Compute some outputs; returns a dict of them, and the tape or None. The values of the inputs
        `donated` may be overwritten. Without `results` only the tape is wanted. A model that runs inside
        another is told where the values of its inputs live (`placed`)."""
        arrivals = self.find_arrivals(init, placed)
        plan = self._plan(tuple(vout), record, monitor is None, donated, results, arrivals)
        if placed is None and plan.places.complaint is not None:
            raise plan.places.complaint
        slots = None
        if self._tape is not None:
            slots = self._tape.slots
            init = self._optional | {name: as_zero(value) for name, value in init.items()}
        values, slots = self.runner(plan, init, slots, monitor)
        out = dict(zip(plan.vout, values))
        return out, (Tape(self, plan, slots, init, out) if record else None)

    def derive(self, plan: Plan, kind: str) -> Self:
        """The model of a derivative, 'vjp', 'jvp' or 'hvp', for all runs of a recording plan of this model."""
        model: Self | None = plan.derived.get(kind)
        if model is None:
            model = type(self)()
            model._base, model._kind = plan, kind
            write_sweep(kind, plan, self, model)
            plan.derived[kind] = model
        return model

    def on(self, tape: Tape) -> Self:
        """This derived model, joined with a tape of the original."""
        joined = type(self)()
        list.extend(joined, self)
        for name in "_inputs", "_outputs", "_plans", "_base", "_kind", "_optional":
            setattr(joined, name, getattr(self, name))
        joined._tape = tape
        return joined

    def compute(
        self,
        vout: Names,
        init: Values,
        return_tape: bool = False,
        return_dict: bool = False,
        monitor: Monitor | None = None,
    ) -> Any:
        """Compute outputs of the model.

        Parameters
        ----------
        vout : str or list of str
            One name gives one value, a list gives a list.
        init : dict, or list of (name, value)
            Values for the inputs.
        return_tape : bool
            Return `(out, tape)`. The tape covers all outputs of the model.
        return_dict : bool
            Return the values as a dict.
        monitor : callable
            `monitor(node, inputs, outputs, context)` is called after each node.

        Raises
        ------
        UnexpectedOutput
            The model has no such output.
        ResolveError
            The value of an input that is needed was not given.
        """
        names = names_of(vout)
        every = tuple(dict.fromkeys([*self._outputs, *names])) if return_tape else names
        out, tape = self._run(every, self._conforming(dict(init)), return_tape, monitor)
        if return_tape:
            tape.shared = True
        result = select(out, vout, return_dict)
        return (result, tape) if return_tape else result

    def compute_with_vjp(
        self, init: Values, v: Values, return_dict: bool = False, monitor: Monitor | None = None
    ) -> tuple[Any, Any]:
        """Compute outputs and a vector-Jacobian product.

        Parameters
        ----------
        init : dict, or list of (name, value)
            Values for the inputs.
        v : dict, or list of (name, value)
            Cotangents of outputs, by the names `_y`; these outputs are computed.

        Returns
        -------
        out, vjp : lists
            The outputs in the order of `v`, and the cotangents of the inputs in the order of `init`.
            Dicts if `return_dict`.
        """
        init, v = dict(init), dict(v)
        vout = [without(name, "_", None) for name in v]
        out, tape = self._run(vout, init, True, monitor)
        tape.consume()
        pulled = tape.get_vjp().compute(tape.get_vjp_vout(), v, return_dict=return_dict, monitor=monitor)
        return select(out, vout, return_dict), pulled

    def compute_with_jvp(
        self,
        vout: Names,
        init: Values,
        v: Values,
        return_dict: bool = False,
        monitor: Monitor | None = None,
    ) -> tuple[Any, Any]:
        """Compute outputs and a Jacobian-vector product.

        Parameters
        ----------
        vout : str or list of str
        init : dict, or list of (name, value)
            Values for the inputs.
        v : dict, or list of (name, value)
            Tangents of inputs, by the names `x_`. Inputs that are not named have the tangent zero.

        Returns
        -------
        out, jvp
            The outputs and their tangents, each a value if `vout` is a str, else a list. Dicts if
            `return_dict`.
        """
        out, tape = self._run(names_of(vout), dict(init), True, monitor)
        tangents = self._tangents(dict(v))
        tape.consume()
        pushed = tape.get_jvp().compute(
            [name + "_" for name in names_of(vout)], tangents, return_dict=return_dict, monitor=monitor
        )
        if not return_dict and isinstance(vout, str):
            pushed = pushed[0]
        return select(out, vout, return_dict), pushed

    def compute_with_gnDp(
        self,
        vout: Names,
        init: Values,
        v: Values,
        return_dict: bool = False,
        monitor: Monitor | None = None,
    ) -> tuple[Any, Any]:
        """Compute outputs and a Gauss-Newton product J^T J v.

        Parameters are those of `compute_with_jvp`. The second result is in the order of `init`, as in
        `compute_with_vjp`.
        """
        names = names_of(vout)
        out, tape = self._run(names, dict(init), True, monitor)
        tangents = self._tangents(dict(v))
        pushed = tape.get_jvp().compute([name + "_" for name in names], tangents, monitor=monitor)
        cotangents = {"_" + name: tangent for name, tangent in zip(names, pushed)}
        tape.consume()
        pulled, _ = tape.get_vjp()._run(tape.get_vjp_vout(), cotangents, monitor=monitor)
        return select(out, vout, return_dict), select(pulled, tape.get_vjp_vout(), return_dict)

    # Compute a Hessian-vector product
    def compute_with_hvp(
        self, vout: Names, init: Values, v: Values, return_dict: bool = False, monitor: Monitor | None = None
    ) -> tuple[Any, Any, Any]:
        """Compute outputs, a gradient, and the product of a Hessian with a vector.

        Parameters
        ----------
        vout : str or list of str
        init : dict, or list of (name, value)
            Values for the inputs.
        v : dict, or list of (name, value)
            The vector: tangents of inputs, by the names `x_`; those that are not named are zero. Also the
            cotangents of outputs, by the names `_y`; an output that is a real number may be left out and has
            the cotangent 1.

        Returns
        -------
        out, vjp, hvp
            The outputs in the form of `vout`; the gradient of sum Re(conj(_y) y) over all outputs, and its
            derivative along the vector, in the order of `init`. Dicts if `return_dict`; in the last the names
            are `_x_`.

        Raises
        ------
        BrokenPrimitive
            An operator does not offer its `hvp`.
        BadArgument
            A cotangent is missing, or a tangent or cotangent does not fit its value.
        """
        names, v = names_of(vout), dict(v)
        out, tape = self._run(names, dict(init), True, monitor)
        cotangents: dict[str, Value] = {}
        for name in names:
            cotangents["_" + name] = cotangent = v.pop("_" + name, None)
            # Check the cotangent, or find that it is 1
            if cotangent is None:
                if not is_real_number(out[name]):
                    raise BadArgument(
                        f"the output '{name}' is {describe(out[name])}, not a real number; give its cotangent "
                        f"'_{name}', and the Hessian is that of the sum of their products"
                    )
                cotangents["_" + name] = 1.0
        tape.consume()
        hvp, gradient, product = tape.get_hvp(), tape.get_vjp_vout(), tape.get_hvp_vout()
        given = {**cotangents, **self._tangents(v)}
        swept = hvp.compute([*gradient, *product], given, return_dict=True, monitor=monitor)
        return (
            select(out, vout, return_dict),
            select(swept, gradient, return_dict),
            select(swept, product, return_dict),
        )

    def _tangents(self, v: dict[str, Value]) -> dict[str, Value]:
        for name in v:
            if without(name, None, "_") not in self._inputs:
                raise BadArgument(
                    f"'{name}' is no tangent of an input"
                    + did_you_mean(name, [name + "_" for name in self._inputs])
                )
        return {name + "_": v.get(name + "_", ZeroGradient) for name in self._inputs}

    def _conforming(self, init: dict[str, Value]) -> dict[str, Value]:
        """What is given to a derived model, fit for the values that it belongs to."""
        if self._tape is None:
            return init
        forms: dict[str, Any] = {}
        if self._kind in ("vjp", "hvp"):
            forms.update(("_" + name, form_of(value)) for name, value in self._tape.out.items())
        if self._kind in ("jvp", "hvp"):
            forms.update((name + "_", form) for name, form in self._tape.forms.items())
        forms.update((name, forms[name[:-1]]) for name in self._optional)
        for name in init if self._optional else ():
            if name not in self._inputs:
                raise BadArgument(
                    f"the derived model has no input '{name}'" + did_you_mean(name, list(self._inputs))
                )
        return {
            name: conform(name, as_zero(x), forms[name]) if name in forms else x for name, x in init.items()
        }


class Builder(Model):
    """A model in a `with` statement, which shows in a program where the model is built."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        return None


# Tools of models
def as_zero(value: Value) -> Value:
    """A tangent or cotangent, with ZeroGradient for the numbers 0 in it."""
    if type(value) is list:
        return [as_zero(item) for item in value]
    return ZeroGradient if ZeroGradient.is_zero(value) else value


def names_of(vout: Names) -> list[str]:
    return [vout] if isinstance(vout, str) else list(vout)


def select(out: dict[str, Value], vout: Names, return_dict: bool = False) -> Any:
    """The values of the outputs `vout` in the form that the caller wants."""
    if return_dict:
        return {name: out[name] for name in names_of(vout)}
    return out[vout] if isinstance(vout, str) else [out[name] for name in vout]


def without(name: str, prefix: str | None, suffix: str | None) -> str:
    """The name of a variable, from that of its cotangent (prefix) or tangent (suffix)."""
    if prefix and not name.startswith(prefix) or suffix and not name.endswith(suffix):
        raise BadArgument(
            f"the name of a {'cotangent starts' if prefix else 'tangent ends'} with '_', got '{name}'; "
            f"did you mean '{prefix or ''}{name}{suffix or ''}'?"
        )
    return name[1:] if prefix else name[:-1]


def is_real_number(value: Value) -> bool:
    """Whether a value is a real number, or an array without axes that holds one."""
    if isinstance(value, (int, float)):
        return True
    kind = getattr(getattr(value, "dtype", None), "kind", None)
    return kind in ("i", "u", "f") and getattr(value, "shape", None) == ()
