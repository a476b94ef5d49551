"""Copies and pickles of models, symbols, operators and tapes; each copy is whole."""

from __future__ import annotations

import copyreg
import pickle
import sys
from collections import ChainMap
from collections.abc import Callable
from copy import deepcopy
from operator import attrgetter
from typing import Any

import numpy

from .autooperator import AutoOperator
from .chain import Chain
from .execution import describe
from .graph import Graph, Node
from .handover import duplicate
from .model import Model
from .operator import InstanceOperator, Operator, Primitive
from .runs import Root, Run
from .store import Disk, InMemory, OnDisk
from .symbol import BaseSymbol, Ignored, IgnoredSymbol, Literal, Symbol, Value, leaves
from .tape import Tape
from .valuetypes import IMMUTABLE, VALUE_TYPES

Reduced = tuple[Any, ...]
Memo = dict[int, Any]


def attach(*classes: type, **methods: Callable[..., Any]) -> None:
    """Give classes special methods, by their names without underscores."""
    for cls in classes:
        for name, method in methods.items():
            setattr(cls, f"__{name}__", method)


# Operators
def reduce_operator(operator: Any, protocol: Any = None) -> str | Reduced:
    """An operator by the name under which it is found, or else by what it was made of."""
    if is_found(operator):
        return str(operator.__qualname__)
    if isinstance(operator, Chain):
        return Chain, (operator.step, operator.n, operator.schedule, operator.folder, operator.comm)
    made_of = getattr(operator, "made_of", None)
    if made_of is not None:
        base, changes = made_of
        return vary, (base, changes)
    # Complain that nobody finds the operator
    raise pickle.PicklingError(
        f"{operator!r} cannot be pickled: nobody finds it as {operator.__module__}.{operator.__qualname__}. "
        "Declare it at the top level of a module, or let the other side build the model"
    )


def is_found(operator: Any) -> bool:
    """Whether an operator is what its module has under its name."""
    try:
        return attrgetter(operator.__qualname__)(sys.modules[operator.__module__]) is operator
    except (AttributeError, KeyError):
        return False


def vary(base: AutoOperator, changes: dict[str, Any]) -> AutoOperator:
    return base._vary(**changes)


def itself(x: Any, memo: Memo | None = None) -> Any:
    return x


attach(Operator, Primitive, copy=itself, deepcopy=itself)
attach(Operator, reduce_ex=reduce_operator)
attach(Primitive, reduce_ex=lambda self, protocol: (getattr, (self.operator, self.kind)))
attach(InstanceOperator, reduce_ex=lambda self, protocol: (type(self), (self.base, self.instance)))
attach(Root, reduce_ex=lambda self, protocol: (Root, (self.seed,)))
attach(Run, reduce_ex=lambda self, protocol: (Run, (self.outer, self.number)))

# What is on disk
attach(Disk, reduce_ex=lambda self, protocol: (Disk, (self.folder, self.comm)))
attach(OnDisk, reduce_ex=lambda self, protocol: (InMemory, (self.get(),)))
attach(Disk, OnDisk, deepcopy=itself)


# Symbols
def reduce_symbol(symbol: Any, protocol: Any = None) -> str | Reduced:
    if type(symbol) is IgnoredSymbol:
        return "Ignored"
    return copyreg.__newobj__, (type(symbol),), state_of(symbol)  # type: ignore[attr-defined]


def state_of(symbol: BaseSymbol) -> dict[str, Any]:
    """All attributes of a symbol; its name as a text, its model as itself."""
    slots = [name for cls in type(symbol).__mro__ for name in vars(cls).get("__slots__", ())]
    state = {name: getattr(symbol, name) for name in slots if name != "__weakref__"}
    state.update(getattr(symbol, "__dict__", {}))
    if isinstance(symbol, Symbol):
        state.update(_label=symbol._name, _graph=symbol._model if symbol._graph else None)
    return state


def set_state(symbol: BaseSymbol, state: dict[str, Any]) -> None:
    for name, value in state.items():
        object.__setattr__(symbol, name, value)
    if isinstance(symbol, Symbol) and symbol._graph is not None:
        symbol._graph = symbol._graph._ref  # type: ignore[attr-defined]


def copy_symbol(symbol: Any, memo: Memo) -> Any:
    """A symbol of a copy of its model; which it keeps alive, if nobody else does."""
    if symbol is Ignored:
        return symbol
    model = symbol._model if isinstance(symbol, Symbol) else None
    if model is not None and id(model) not in memo:
        keep_alive(deepcopy(model, memo))
        return memo[id(symbol)]
    other = memo[id(symbol)] = object.__new__(type(symbol))
    set_state(other, {name: copy_value(value, memo) for name, value in state_of(symbol).items()})
    return other


def keep_alive(graph: Graph) -> None:
    """Let the symbols of a graph hold it."""
    graph._ref = lambda: graph
    results = [symbol for node in graph for symbol in node.varout.values()]
    for symbol in [*graph._inputs.values(), *results]:
        for leaf in leaves(symbol):
            if isinstance(leaf, Symbol):
                leaf._graph = graph._ref


attach(BaseSymbol, reduce_ex=reduce_symbol, setstate=set_state, copy=itself, deepcopy=copy_symbol)


# Values
def copy_value(value: Value, memo: Memo) -> Value:
    """A deep copy of a value; what cannot be copied, such as a communicator, is shared."""
    if id(value) in memo or isinstance(value, IMMUTABLE):
        return memo.get(id(value), value)
    kind = type(value)
    if kind in (list, tuple):
        other = kind([copy_value(item, memo) for item in value])
    elif kind is dict:
        other = {key: copy_value(item, memo) for key, item in value.items()}
    elif isinstance(value, numpy.ndarray) or VALUE_TYPES[kind].take_apart(value) is not None:
        other = duplicate(value)
    elif isinstance(value, (BaseSymbol, Node, Graph, Tape)):
        return deepcopy(value, memo)
    else:
        other = copy_object(value, memo)
    # Remember the copy
    memo[id(value)] = other
    memo.setdefault(id(memo), []).append(value)  # as long as the memo lives, its numbers must hold
    return other


def copy_object(value: Any, memo: Memo) -> Any:
    """A deep copy of an object, or the object if some part of it cannot be copied."""
    trial: Any = ChainMap({}, memo)
    try:
        other = deepcopy(value, trial)
    except Exception:
        return value
    memo.update(trial.maps[0])
    return other


# Nodes and models
def state_of_node(node: Node) -> dict[str, Any]:
    names = "primitive", "varin", "varout", "number", "forward", "donated", "placed"
    return {name: getattr(node, name) for name in names} | dict(_origin=node.place, cache=None)


def reduce_node(node: Node, protocol: Any = None) -> Reduced:
    check_constants(node)
    return copyreg.__newobj__, (Node,), state_of_node(node)  # type: ignore[attr-defined]


def check_constants(node: Node) -> None:
    """Complain about a constant that cannot be pickled, and tell where it is."""
    for name, symbol in node.varin.items():
        for leaf in leaves(symbol):
            # Try to pickle a constant
            value = leaf._value if type(leaf) is Literal else None
            if isinstance(value, (*IMMUTABLE, numpy.ndarray)):
                continue
            try:
                pickle.dumps(value)
            except Exception as error:
                raise pickle.PicklingError(
                    f"the model cannot be pickled, since the argument '{name}' of {node.name_and_place}, "
                    f"is {describe(value)}, which cannot ({error}). Make it an input of the model, "
                    "or let the other side build the model"
                ) from error


def set_state_of_node(node: Node, state: dict[str, Any]) -> None:
    for name, value in state.items():
        setattr(node, name, value)


def copy_node(node: Node, memo: Memo) -> Node:
    other = memo[id(node)] = Node.__new__(Node)
    set_state_of_node(other, copy_items(state_of_node(node), memo))
    return other


def copy_items(state: dict[str, Any], memo: Memo) -> dict[str, Any]:
    return {name: copy_value(value, memo) for name, value in state.items()}


def state_of_graph(graph: Graph) -> tuple[list[Node], dict[str, Any]]:
    """The nodes of a graph, and its attributes, without what can be made again."""
    made_again = "_plans", "shared", "_ref"
    return list(graph), {name: value for name, value in vars(graph).items() if name not in made_again}


def reduce_graph(graph: Any, protocol: Any = None) -> Reduced:
    if isinstance(graph, Model) and graph._tape is not None:
        return derived, (graph._tape, graph._kind)
    return new_graph, (type(graph),), state_of_graph(graph)


def derived(tape: Tape, kind: str) -> Any:
    return getattr(tape, f"get_{kind}")()


def new_graph(cls: type[Graph]) -> Graph:
    graph = cls.__new__(cls)
    (Model if issubclass(cls, Model) else cls).__init__(graph)
    return graph


def set_state_of_graph(graph: Graph, state: tuple[list[Node], dict[str, Any]]) -> None:
    nodes, attributes = state
    list.extend(graph, nodes)
    vars(graph).update(attributes)


def copy_graph(graph: Any, memo: Memo | None = None) -> Any:
    """A whole copy of a model, also for copy.copy: symbols know only one model."""
    memo = {} if memo is None else memo
    if isinstance(graph, Model) and graph._tape is not None:
        return derived(deepcopy(graph._tape, memo), graph._kind)
    other = memo[id(graph)] = new_graph(type(graph))
    nodes, attributes = state_of_graph(graph)
    set_state_of_graph(other, ([deepcopy(node, memo) for node in nodes], copy_items(attributes, memo)))
    return other


attach(Node, reduce_ex=reduce_node, setstate=set_state_of_node, copy=itself, deepcopy=copy_node)
attach(Graph, reduce_ex=reduce_graph, setstate=set_state_of_graph, copy=copy_graph, deepcopy=copy_graph)


# Tapes
def state_of_tape(tape: Tape) -> dict[str, Any]:
    names = "slots", "init", "out", "forms", "run", "shared"
    return {name: getattr(tape, name) for name in names}


def reduce_tape(tape: Tape, protocol: Any = None) -> Reduced:
    return new_tape, (tape.model, tape.plan.made_for), state_of_tape(tape)


def new_tape(model: Any, made_for: tuple[Any, ...]) -> Tape:
    """An empty tape; its plan is the one that the model makes for the same purpose."""
    tape = Tape.__new__(Tape)
    tape.model, tape.plan = model, model._plan(*made_for)
    return tape


def set_state_of_tape(tape: Tape, state: dict[str, Any]) -> None:
    vars(tape).update(state)
    tape.mark()


def copy_tape(tape: Tape, memo: Memo) -> Tape:
    other = memo[id(tape)] = new_tape(deepcopy(tape.model, memo), tape.plan.made_for)
    set_state_of_tape(other, copy_items(state_of_tape(tape), memo))
    return other


attach(Tape, reduce_ex=reduce_tape, setstate=set_state_of_tape, deepcopy=copy_tape)
