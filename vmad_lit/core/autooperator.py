"""Autooperators: operators that are made of a model."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from copy import copy
from typing import Any, overload
from weakref import WeakKeyDictionary

from .autodiff import ZERO
from .declaration import check_class
from .error import BadArgument, ModelError, did_you_mean
from .execution import Plan
from .graph import Node
from .handover import duplicate, snapshot
from .marks import LARGE, Mark, mark, matches
from .model import Builder, Model
from .operator import InstanceOperator, Operator, Primitive, declare
from .runs import Root, current_root, run_inside
from .symbol import Literal, Symbol, Value
from .tape import Tape
from .valuetypes import IMMUTABLE

TAPE = "tape of the model"


class AutoOperator(Operator):
    """An operator whose application is a model, and whose derivatives are those of the model.

    Attributes
    ----------
    argnames : tuple of str
        All arguments, inputs and hyper-parameters.
    hyperargs : dict
        The hyper-parameters that `bind` has fixed.
    """

    collective = True  # there may be collective operators inside
    trusted = True  # a run looks at the operators inside

    def __init__(
        self, prototype: Any, main: Callable[..., Any], argnames: Iterable[str], defaults: Mapping[str, Any]
    ) -> None:
        self._main = main
        self._defaults = dict(defaults)
        self._keeps_tape = True
        self._opened: dict[tuple[str, ...], AutoOperator] = {}
        self.argnames = tuple(argnames)
        self.hyperargs: dict[str, Any] = {}
        self.__bound_model__: Model | None = None
        self.__bound_tape__: Tape | None = None
        super().__init__(prototype)

    def _make_primitives(self) -> None:
        known: tuple[str, ...] = (TAPE,) if self._keeps_tape else self.argnames
        self.apl = Primitive(
            self, "apl", compute, self.argnames, compute_and_record if self._keeps_tape else None
        )
        self.apl.defaults = self._defaults
        self.vjp = Primitive(self, "vjp", differentiate, [*known, *("_" + name for name in self.aout)])
        self.jvp = Primitive(self, "jvp", differentiate, [*known, *(name + "_" for name in self.ain)])
        of_vjp = *("_" + name for name in self.aout), *(name + "_" for name in self.ain)
        self.hvp = Primitive(self, "hvp", differentiate, [*known, *of_vjp])
        self.rcd = None
        self.inplace = {*self.ain, *("_" + name for name in self.aout)}
        self._find_recorded()

    def build(self, /, **hyperargs: Any) -> Model:
        """The model, for given hyper-parameters."""
        for name in hyperargs:
            if name in self.ain:
                raise ModelError(
                    f"'{name}' is an input of {self.__name__}, not a hyper-parameter; its value is "
                    "given when the model is computed"
                )
        return self._build(hyperargs)

    def _build(self, hyperargs: Mapping[str, Any]) -> Model:
        if self.__bound_model__ is not None:
            return self.__bound_model__
        hyperargs = snapshot({**self._defaults, **hyperargs})
        # Check that the hyper-parameters are complete
        expected = [name for name in self.argnames if name not in self.ain]
        for name in hyperargs:
            if name not in expected:
                raise BadArgument(
                    f"{self.__name__} has no hyper-parameter '{name}'" + did_you_mean(name, expected)
                )
        for name in expected:
            if name not in hyperargs:
                raise ModelError(f"to build its model, {self.__name__} needs the hyper-parameter '{name}'")
        with Builder() as m:
            symbols = {name: m.input(name) for name in self.ain}
            results = self._main(m, fill_in(hyperargs, symbols))
            # Check that the results are complete
            for name in self.aout:
                if name not in results:
                    raise ModelError(
                        f"{self.__name__} declares the output '{name}', but its function produced "
                        f"{', '.join(results) or 'nothing'}"
                    )
            m.output(**results)
        return m

    # Methods for objects that hold symbols
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given, places = self._bind(args, kwargs)
        symbols: dict[str, Symbol] = {}
        for name in self.apl.argnames:
            if name not in self.ain:
                symbols.update(find_symbols(given[name], name))
        if not symbols:
            return Operator.__call__(self, *args, **kwargs)
        variant, given = self._open(tuple(symbols)), {**given, **symbols}
        return Operator.__call__(variant, *(given[name] for name in variant.apl.argnames), **places)

    def _open(self, names: tuple[str, ...]) -> AutoOperator:
        """The variant with further inputs, which are symbols in hyper-parameters."""
        if names not in self._opened:
            self._opened[names] = self._vary(
                ain={**self.ain, **dict.fromkeys(names, "*")}, argnames=(*self.argnames, *names)
            )
        return self._opened[names]

    # Variations
    def _vary(self, **changes: Any) -> AutoOperator:
        variant: AutoOperator = object.__new__(type(self))
        variant.__dict__.update(self.__dict__, _opened={}, made_of=(self, changes), **changes)
        variant._make_primitives()
        return variant

    def bind(self, /, **hyperargs: Any) -> AutoOperator:
        """A variant with the hyper-parameters fixed, whose model is built once."""
        hyperargs = snapshot(hyperargs)
        model = self.build(**hyperargs)
        return self._vary(
            __bound_model__=model,
            hyperargs={**self._defaults, **hyperargs},
            argnames=tuple(name for name in self.argnames if name in self.ain),
            _defaults={},
        )

    def precompute(self, /, **arguments: Any) -> AutoOperator:
        """A variant that was computed already, for given inputs and hyper-parameters, and replays its
        tape from now on."""
        inputs = {name: value for name, value in arguments.items() if name in self.ain}
        hyperargs = {name: value for name, value in arguments.items() if name not in self.ain}
        model = self._build(hyperargs)
        _, tape = model._run(self.aout, {name: duplicate(value) for name, value in inputs.items()}, True)
        tape.shared = True
        return self._vary(
            __bound_model__=model, __bound_tape__=tape, _defaults={**self._defaults, **hyperargs}
        )

    @property
    def forgetful(self) -> AutoOperator:
        """A variant that keeps no tape, and makes it anew when a derivative is computed."""
        return self._vary(_keeps_tape=False)

    @property
    def rematerialise(self) -> AutoOperator:
        """Another name for `forgetful`."""
        variant: AutoOperator = self.forgetful
        return variant

    # What is known of a node before it runs
    def model_of(self, node: Node) -> Model | None:
        model: Model | None = find_known_model(node)
        return model

    def fresh_results(self, node: Node, plan: Plan) -> Collection[str]:
        try:
            inside = find_plan(node, plan)
        except Exception:
            return ()  # the run will meet it again, and tell where
        return inside[0].fresh_outputs if inside else ()

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else InstanceAutoOperator(self, instance)


def find_model(node: Any, arguments: Mapping[str, Any]) -> tuple[Model, dict[str, Any]]:
    """The model of an autooperator for the hyper-parameters in `arguments`, and its inputs."""
    operator = node.operator
    inputs = {name: arguments[name] for name in operator.ain}
    if operator.__bound_model__ is not None:
        return operator.__bound_model__, inputs
    hyperargs = {name: arguments[name] for name in operator.argnames if name not in operator.ain}
    home = node.forward or node
    if home.cache is None or not is_known(home.cache[0], home.cache[2], hyperargs):
        marks = {name: mark(x, LARGE) for name, x in hyperargs.items() if not isinstance(x, IMMUTABLE)}
        home.cache = hyperargs, share_model(home, hyperargs), marks
    return home.cache[1], inputs


def compute(node: Any, **arguments: Any) -> dict[str, Any]:
    operator = node.operator
    if operator.__bound_tape__ is not None:
        return {name: operator.__bound_tape__.out[name] for name in operator.aout}
    model, inputs = find_model(node, arguments)
    return model._run(
        find_wanted(node), inputs, donated=node.donated, placed=node.placed, run=run_inside(node)
    )[0]


def compute_and_record(node: Any, **arguments: Any) -> dict[str, Any]:
    tape = find_tape(node, arguments)
    out = tape.out if node.operator.__bound_tape__ is not None else tape.let_go()
    return {**{name: out[name] for name in find_wanted(node)}, TAPE: tape}


def find_wanted(node: Any) -> list[str]:
    """The outputs that the application of an autooperator, or a derivative of it, has to do with."""
    if node.primitive.kind in ("apl", "jvp"):
        return [name for name in node.operator.aout if node.needs(name)]
    return [name for name in node.operator.aout if node.varin["_" + name] is not ZERO]


def find_tape(node: Any, arguments: Mapping[str, Any]) -> Any:
    if TAPE in arguments:
        return arguments[TAPE]
    operator = node.operator
    if operator.__bound_tape__ is not None:
        return operator.__bound_tape__
    model, inputs = find_model(node, arguments)
    return model._run(
        find_wanted(node), inputs, True, donated=node.donated, placed=node.placed, run=run_inside(node)
    )[1]


def differentiate(node: Any, **arguments: Any) -> Any:
    tape = find_tape(node, arguments)
    if not node.operator._keeps_tape:
        tape.consume()
    derived = getattr(tape, f"get_{node.primitive.kind}")()
    given = {name: arguments[name] for name in node.primitive.ain if name in derived._inputs}
    return derived._run(node.used, derived._conforming(given), donated=node.donated)[0]


def share_model(node: Any, hyperargs: Mapping[str, Any]) -> Any:
    """The model for some hyper-parameters: that of another node of the same graph, or a new one."""
    operator, graph = node.operator, node.graph
    if graph is None or not all(node.is_literal(name) for name in hyperargs):
        return operator._build(hyperargs)
    key = operator, *[mark(value, LARGE) for value in hyperargs.values()]
    if key not in graph.shared:
        graph.shared[key] = operator._build(hyperargs)
    return graph.shared[key]


def is_known(kept: dict[str, Any], marks: dict[str, Mark], hyperargs: Mapping[str, Any]) -> bool:
    """Whether hyper-parameters are the same as those that were kept, and have not changed since."""
    for name, value in hyperargs.items():
        before = kept[name]
        if isinstance(value, IMMUTABLE):
            if value is not before and (type(value) is not type(before) or value != before):
                return False
        elif name not in marks or not matches(marks[name], mark_once(value) if value is before else None):
            return False
    return True


SEEN: WeakKeyDictionary[Root, dict[int, tuple[Value, Mark]]] = WeakKeyDictionary()


def mark_once(value: Value) -> Mark:
    """The mark of a hyper-parameter, taken once in each run of the outermost model."""
    root = current_root()
    if root is None:
        return mark(value, LARGE)
    seen = SEEN.setdefault(root, {})
    if id(value) not in seen:
        seen[id(value)] = value, mark(value, LARGE)
    return seen[id(value)][1]


@overload
def autooperator(*spec: str) -> Callable[[Callable[..., Any]], AutoOperator]: ...


@overload
def autooperator(spec: Callable[..., Any], /) -> AutoOperator: ...


def autooperator(*spec: Any) -> Any:
    """Declare an operator by a function that builds its model.

    The forms are

    - `@autooperator('x, y -> z')`, also `@autooperator('x', 'y', '->', 'z')`, for a function of x, y
      and hyper-parameters;
    - `@autooperator` for a function with annotations `def f(x: '*', y: '*', n) -> 'z'`;
    - `@autooperator` for a class with `ain`, `aout` and `main(self, x, y, n)`, where `self` is the model.

    The function returns the output, a tuple of the outputs in order, or a dict of them by name.
    Parameters that are not inputs are hyper-parameters and may have defaults.
    """
    if len(spec) == 1 and inspect.isclass(spec[0]):
        return from_class(spec[0])
    if len(spec) == 1 and callable(spec[0]):
        return from_annotations(spec[0])
    # Read the specification
    words = [word.strip() for part in spec for word in part.replace("->", ",->,").split(",")]
    words = [word for word in words if word]
    if words.count("->") != 1:
        raise BadArgument(f"expected a specification of the form 'x, y -> z', got {' '.join(words)!r}")
    arrow = words.index("->")
    return lambda function: from_function(function, words[:arrow], words[arrow + 1 :])


def from_annotations(function: Callable[..., Any]) -> AutoOperator:
    ain = {name: unquoted(text) for name, text in getattr(function, "__annotations__", {}).items()}
    if "return" not in ain:
        raise BadArgument(
            f"the outputs of {function.__name__} are not declared; "
            "write def f(x: '*') -> 'y', or give 'x -> y'"
        )
    aout = ain.pop("return")
    return from_function(function, ain, aout)


def unquoted(annotation: Any) -> Any:
    """An annotation as it was written, in a module that has its annotations kept as source text, too."""
    quoted = isinstance(annotation, str) and annotation[:1] in ("'", '"')
    return ast.literal_eval(annotation) if quoted else annotation


def from_function(function: Callable[..., Any], ain: Any, aout: Any) -> AutoOperator:
    names = "__doc__", "__module__", "__qualname__"
    attributes: dict[str, Any] = {name: getattr(function, name) for name in names}
    attributes |= dict(ain=ain, aout=aout, main=staticmethod(function))
    prototype = type(function.__name__, (), attributes)
    parameters = inspect.signature(function).parameters.values()
    return make(prototype, parameters, lambda m, arguments: function(**arguments))


def from_class(prototype: Any) -> AutoOperator:
    check_class(prototype, ("main",))
    parameters = list(inspect.signature(prototype.main).parameters.values())[1:]
    return make(prototype, parameters, lambda m, arguments: prototype.main(m, **arguments))


def make(prototype: Any, parameters: Iterable[inspect.Parameter], call: Callable[..., Any]) -> AutoOperator:
    ain, aout = declare(prototype.ain), declare(prototype.aout)
    parameters = list(parameters)
    argnames = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    missing = [name for name in ain if name not in argnames]
    if missing and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        raise BadArgument(f"the function of {prototype.__name__} has no parameter for its inputs {missing}")
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty and p.name not in ain}

    def main(m: Builder, arguments: dict[str, Any]) -> dict[str, Any]:
        results = call(m, arguments)
        if isinstance(results, dict):
            return results
        return dict(zip(aout, [results] if len(aout) == 1 else results))

    return AutoOperator(prototype, main, missing + argnames, defaults)


class InstanceAutoOperator(InstanceOperator):
    """An autooperator as a method: the instance is passed as the first argument."""

    def _with_instance(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {self.base.argnames[0]: self.instance, **arguments}

    def build(self, **hyperargs: Any) -> Any:
        return self.base.build(**self._with_instance(hyperargs))

    def bind(self, **hyperargs: Any) -> Any:
        return self.base.bind(**self._with_instance(hyperargs))

    def precompute(self, **arguments: Any) -> InstanceAutoOperator:
        base = self.base.precompute(**self._with_instance(arguments))
        return InstanceAutoOperator(base, self.instance)

    @property
    def forgetful(self) -> InstanceAutoOperator:
        return InstanceAutoOperator(self.base.forgetful, self.instance)

    @property
    def rematerialise(self) -> InstanceAutoOperator:
        return self.forgetful


def find_symbols(value: object, path: str) -> dict[str, Symbol]:
    """The symbols in an object, as a dict by dotted names that begin with `path`."""
    found: dict[str, Symbol] = {}
    for name in getattr(type(value), "__symbols__", ()):
        part, place = getattr(value, name), f"{path}.{name}"
        if isinstance(part, Symbol):
            found[place] = part
        else:
            found.update(find_symbols(part, place))
    return found


def fill_in(arguments: Mapping[str, Any], symbols: Mapping[str, Symbol]) -> dict[str, Any]:
    """All arguments of the function that builds a model; symbols go where they belong, in objects too."""
    inputs = {name: symbol for name, symbol in symbols.items() if "." not in name}
    objects = {name: replace_symbols(value, name, symbols) for name, value in arguments.items()}
    return {**objects, **inputs}


def replace_symbols(value: Any, path: str, symbols: Mapping[str, Symbol]) -> Any:
    """The object, or a copy with other symbols in it."""
    changes = {}
    for name in getattr(type(value), "__symbols__", ()):
        part, place = getattr(value, name), f"{path}.{name}"
        new = symbols[place] if place in symbols else replace_symbols(part, place, symbols)
        if new is not part:
            changes[name] = new
    if not changes:
        return value
    value = copy(value)
    for name, part in changes.items():
        object.__setattr__(value, name, part)
    return value


def find_known_model(node: Any) -> Any:
    """The model of an autooperator, if its hyper-parameters are known before the run; or None."""
    operator = node.operator
    constants = {name: node.varin[name] for name in operator.argnames if name not in operator.ain}
    if any(type(symbol) is not Literal for symbol in constants.values()):
        return None
    values = {name: symbol._value for name, symbol in constants.items()}
    return find_model(node, {**node.varin, **values})[0]


def find_plan(node: Any, plan: Plan) -> tuple[Plan, Model] | None:
    """The plan inside a node of a plan, and its model, if they are known before the run."""
    operator = node.operator
    if type(operator) is not AutoOperator or not operator._keeps_tape or operator.__bound_tape__ is not None:
        return None
    if node.primitive.kind == "apl":
        model = operator.model_of(node)
        if model is None:
            return None
        arrivals = model.find_arrivals({}, node.placed)
        return model._plan(
            tuple(find_wanted(node)), plan.record, True, node.donated, arrivals=arrivals
        ), model
    # Find the plan of a derivative
    if node.primitive.kind != "vjp" or plan.base is None:
        return None
    inside = find_plan(plan.base.stand_ins.get(node.forward, node.forward), plan.base)
    if inside is None:
        return None
    of_original, model = inside
    vjp = model.derive(of_original, "vjp")
    return vjp._plan(tuple(node.used), False, True, node.donated), vjp
