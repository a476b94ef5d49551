"""Models: graphs that can be computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Self

from .autodiff import write_sweep
from .doors import PLAIN_NUMBERS, admit
from .error import BadArgument, UnexpectedOutput, did_you_mean
from .execution import Arrivals, Plan, describe
from .graph import Graph, Node
from .handover import duplicate, hand_over
from .operator import ZeroGradient
from .runs import CURRENT, Run, begin_run
from .symbol import Symbol, Value, leaves
from .tape import Tape
from .valuetypes import conform, form_of

Names = str | list[str]  # one name asks for one value, a list for a list
Values = Mapping[str, Value] | Iterable[tuple[str, Value]]
Monitor = Callable[[Node, Any, Any, Mapping[str, Value]], object]


class Model(Graph):
    """A list of nodes with named inputs and outputs, which can be computed.

    Attributes
    ----------
    seed : int
        Not negative; what the random numbers of `node.rng` begin with, the same on all ranks.
    """

    runner: ClassVar[Callable[..., Any]] = staticmethod(Plan.run)

    def __init__(self) -> None:
        super().__init__()
        self._plans: dict[Any, Plan] = {}
        self._base: Plan | None = None
        self._kind = "apl"
        self._tape: Tape | None = None
        self._optional: dict[str, Value] = {}
        self.seed = 0

    @staticmethod
    def get_model(symbol: Symbol) -> Graph | None:
        """The model that a symbol belongs to, or the fragment of one that no model has claimed yet; None without any."""
        model: Graph | None = symbol._model
        return model

    # What is different on many ranks
    def find_arrivals(self, init: Mapping[str, Value], placed: Mapping[str, Any] | None) -> Arrivals:
        """Where the values of inputs live, as far as it is known. On one rank there is nothing to know."""
        return ()

    def at_the_door(
        self,
        init: Values,
        check: Callable[[dict[str, Value]], dict[str, Value]],
        wanted: Iterable[str] = (),
    ) -> dict[str, Value]:
        """What a check makes of given values, or its error, before the outputs `wanted` are computed."""
        return check(dict(init))

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
            # Complain about outputs that the model does not have
            for name in vout:
                if name not in self._outputs:
                    raise UnexpectedOutput(
                        f"the model has no output '{name}'" + did_you_mean(name, list(self._outputs))
                    )
            plan = self._plans[key] = Plan(self, vout, record, reuse, self._base, donated, results, arrivals)
            plan.made_for = key[:-2]
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
        run: Run | None = None,
    ) -> tuple[dict[str, Value], Any]:
        """Compute some outputs; returns a dict of them, and the tape or None. The values of the inputs
        `donated` may be overwritten. Without `results` only the tape is wanted. A model that runs inside
        another is told where the values of its inputs live (`placed`), and which `run` of the other this is."""
        # Find the plan
        arrivals = self.find_arrivals(init, placed) if self._base is None else ()
        plan = self._plan(tuple(vout), record, monitor is None, donated, results, arrivals)
        if placed is None and plan.places.complaint is not None:
            raise plan.places.complaint
        slots = None
        if self._tape is not None:
            # Begin where the tape ends
            if self._tape.marks:
                self._tape.verify()
            slots = self._tape.slots
            init = self._optional | {name: as_zero(value) for name, value in init.items()}
            run = self._tape.run.again()
        # Run the plan in its place
        run = run or begin_run(self.seed)
        token = CURRENT.set(run)
        try:
            values, slots = self.runner(plan, init, slots, monitor)
        finally:
            CURRENT.reset(token)
        out = dict(zip(plan.vout, values))
        return out, (Tape(self, plan, slots, init, out, run) if record else None)

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

    def _record(self, vout: list[str], init: Values, monitor: Monitor | None) -> Tape:
        """The tape of a run that computes some outputs, from what a caller gives."""
        tape: Tape = self._run(vout, self.at_the_door(init, self._admitted, vout), True, monitor)[1]
        return tape

    def compute(
        self,
        vout: Names,
        init: Values,
        return_tape: bool = False,
        return_dict: bool = False,
        monitor: Monitor | None = None,
        copy: bool = True,
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
        copy : bool
            Whether arrays that share memory with others, with an input or with the tape, are returned as
            copies. If not, they are returned read-only.

        Raises
        ------
        UnexpectedOutput
            The model has no such output.
        ResolveError
            The value of an input that is needed was not given.
        """
        # Compute, and hand over
        names = names_of(vout)
        every = tuple(dict.fromkeys([*self._outputs, *names])) if return_tape else names
        given = self.at_the_door(init, lambda init: self._conforming(self._admitted(init)), every)
        if return_tape:
            given = {name: duplicate(value) for name, value in given.items()}
        out, tape = self._run(every, given, return_tape, monitor)
        if return_tape:
            out = tape.share()
        result = select(hand_over(out, names, copy), vout, return_dict)
        return (result, tape) if return_tape else result

    def compute_with_vjp(
        self,
        init: Values,
        v: Values,
        return_dict: bool = False,
        monitor: Monitor | None = None,
        copy: bool = True,
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
        v = dict(v)
        vout = [without(name, "_", None) for name in v]
        tape = self._record(vout, init, monitor)
        out = tape.let_go()
        tape.consume()
        pulled = tape.get_vjp().compute(tape.get_vjp_vout(), v, False, return_dict, monitor, copy)
        del tape
        return select(hand_over(out, vout, copy), vout, return_dict), pulled

    def compute_with_jvp(
        self,
        vout: Names,
        init: Values,
        v: Values,
        return_dict: bool = False,
        monitor: Monitor | None = None,
        copy: bool = True,
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
        # Run, push tangents forward, and hand over
        names = names_of(vout)
        tape = self._record(names, init, monitor)
        tangents = self._tangents(dict(v))
        out = tape.let_go()
        tape.consume()
        pushed = tape.get_jvp().compute(
            [name + "_" for name in names], tangents, False, return_dict, monitor, copy
        )
        if not return_dict and isinstance(vout, str):
            pushed = pushed[0]
        del tape
        return select(hand_over(out, names, copy), vout, return_dict), pushed

    def compute_with_gnDp(
        self,
        vout: Names,
        init: Values,
        v: Values,
        return_dict: bool = False,
        monitor: Monitor | None = None,
        copy: bool = True,
    ) -> tuple[Any, Any]:
        """Compute outputs and a Gauss-Newton product J^T J v.

        Parameters are those of `compute_with_jvp`. The second result is in the order of `init`, as in
        `compute_with_vjp`.
        """
        # Run, push forward, pull back, and hand over
        names = names_of(vout)
        tape = self._record(names, init, monitor)
        tangents = self._tangents(dict(v))
        out = tape.let_go()
        pushed = tape.get_jvp().compute([name + "_" for name in names], tangents, monitor=monitor)
        cotangents = {"_" + name: tangent for name, tangent in zip(names, pushed)}
        tape.consume()
        gradient = tape.get_vjp_vout()
        pulled, _ = tape.get_vjp()._run(gradient, cotangents, monitor=monitor)
        del tape
        product = select(hand_over(pulled, gradient, copy), gradient, return_dict)
        return select(hand_over(out, names, copy), vout, return_dict), product

    # Compute a Hessian-vector product
    def compute_with_hvp(
        self,
        vout: Names,
        init: Values,
        v: Values,
        return_dict: bool = False,
        monitor: Monitor | None = None,
        copy: bool = True,
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
        tape = self._record(names, init, monitor)
        out = tape.let_go()
        # Find the cotangents of all outputs
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
        # Sweep for the gradient and its change
        tape.consume()
        hvp, gradient, product = tape.get_hvp(), tape.get_vjp_vout(), tape.get_hvp_vout()
        given = {**cotangents, **self._tangents(v)}
        swept = hvp.compute([*gradient, *product], given, False, True, monitor, copy)
        del tape, hvp
        return (
            select(hand_over(out, names, copy), vout, return_dict),
            select([swept[name] for name in gradient], gradient, return_dict),
            select([swept[name] for name in product], product, return_dict),
        )

    def _tangents(self, v: dict[str, Value]) -> dict[str, Value]:
        for name in v:
            if without(name, None, "_") not in self._inputs:
                raise BadArgument(
                    f"'{name}' is no tangent of an input"
                    + did_you_mean(name, [name + "_" for name in self._inputs])
                )
        return {name + "_": v.get(name + "_", ZeroGradient) for name in self._inputs}

    def _admitted(self, init: Values) -> dict[str, Value]:
        """What is given to the model, as it may go in."""
        init = dict(init)
        for name, value in init.items():
            if type(value) not in PLAIN_NUMBERS:
                init[name] = self._admit(name, value)
        return init

    def _admit(self, name: str, value: Value) -> Value:
        try:
            return admit(name, value)
        except BadArgument:
            symbol = self._inputs.get(name)
            if symbol is not None and not is_differentiated(symbol, self):
                return value  # for a hyper-parameter, which may be anything
            raise

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
        # Complain about inputs that a derived model does not have
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


def select(values: list[Value], vout: Names, return_dict: bool = False) -> Any:
    """The values of the outputs `vout` in the form that the caller wants."""
    if return_dict:
        return dict(zip(names_of(vout), values))
    return values[0] if isinstance(vout, str) else values


def is_differentiated(symbol: Symbol, graph: Graph) -> bool:
    """Whether a symbol is an output, or a differentiable argument of a node."""
    used = [graph._outputs.values(), *([node.varin[name] for name in node.primitive.ain] for node in graph)]
    return any(leaf is symbol for symbols in used for s in symbols for leaf in leaves(s))


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
