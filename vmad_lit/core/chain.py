"""Long chains of steps, whose derivatives remember a few states and recompute the rest."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from .autodiff import add_cotangents
from .autooperator import AutoOperator, InstanceAutoOperator, find_known_model, find_model
from .error import BadArgument, BrokenPrimitive
from .execution import Plan
from .graph import Node
from .handover import snapshot
from .marks import literals
from .model import Model
from .operator import InstanceOperator, Operator, Primitive, ZeroGradient
from .runs import Run, run_inside
from .schedules import Actions, find_schedule, is_whole
from .store import Disk, InMemory, OnDisk, find_comm

HISTORY = "history of the chain"

Names = tuple[str, ...]


def checkpoint(
    step: AutoOperator | InstanceAutoOperator,
    n: int,
    ram: int | None = None,
    disk: int | None = None,
    folder: str | None = None,
    schedule: str | Callable[[int], Any] | None = None,
    *,
    period: int | None = None,
    costs: dict[str, float] | None = None,
    comm: Any = None,
) -> Chain | InstanceOperator:
    """A chain of `n` steps as one operator, with a chosen number of states kept for the derivatives.

    Parameters
    ----------
    step : autooperator
        From a state to the next. Its first inputs are the state, as many as it has outputs and in the
        same order; further inputs are parameters. A hyper-parameter `i`, if it has one, receives the
        number of the step, beginning with 0.
    n : int
        The number of steps.
    ram, disk : int
        How many states are kept in memory (by default all) and on disk, at most.
    folder : str, optional
        Where to put the states on disk; by default where temporary files go. The file has no name
        and vanishes with the process, even if it is killed.
    schedule : str or callable, optional
        When to keep a state: 'multistage' (the default), 'revolve', 'two-level', 'disk', 'disk-revolve',
        'periodic-disk-revolve', 'h-revolve', 'mixed', 'tapes' or 'none'; see `SCHEDULES`. Or a function
        from `n` to a schedule of the library `checkpoint_schedules`.
    period : int
        For 'two-level': every how many steps a state is kept on disk.
    costs : dict
        For 'disk-revolve', 'periodic-disk-revolve' and 'h-revolve': relative costs by the names 'forward',
        'reverse' (of a step; 1 by default), 'write' and 'read' (of a state on disk; 2 by default).
    comm : MPI communicator, optional
        The ranks that run the chain together: if one of them cannot keep a state on disk, all raise an
        error. By default that of the first argument that has one, see `ValueType.comm`.

    Returns
    -------
    Operator
        With the inputs, outputs and hyper-parameters of the step, except `i`.

    Raises
    ------
    BadArgument
        The step is none, or the numbers do not make a schedule.
    """
    if isinstance(step, InstanceAutoOperator):
        chain = checkpoint(step.base, n, ram, disk, folder, schedule, period=period, costs=costs, comm=comm)
        return InstanceOperator(chain, step.instance)
    # Check the step and the number of steps
    if not isinstance(step, AutoOperator):
        raise BadArgument(f"the step of a chain is an autooperator, got {step!r}")
    if step.__bound_tape__ is not None:
        raise BadArgument(f"{step.__name__} was precomputed: it replays one step, and makes no chain of them")
    if len(step.aout) > len(step.ain):
        raise BadArgument(
            f"the outputs {list(step.aout)} of a step are its next state, "
            f"but it has only the inputs {list(step.ain)}"
        )
    if not is_whole(n) or n < 1:
        raise BadArgument(f"a chain has at least one step, got n = {n}")
    make = find_schedule(schedule or "multistage", dict(ram=ram, disk=disk, period=period, costs=costs))
    return Chain(step, n, make, folder, comm)


class Chain(Operator):
    """A chain of steps as an operator; made by `checkpoint`."""

    collective = True  # there may be collective operators in the steps
    trusted = True  # a run looks at the operators in the steps
    __bound_model__ = None

    def __init__(
        self, step: AutoOperator, n: int, schedule: Callable[[int], Any], folder: str | None, comm: Any
    ) -> None:
        self.step, self.n, self.schedule, self.folder, self.comm = step, n, schedule, folder, comm
        self._opened: dict[tuple[str, ...], Chain] = {}
        self.state_names = list(step.ain)[: len(step.aout)]
        self.parameter_names = list(step.ain)[len(step.aout) :]
        self.argnames = tuple(name for name in step.argnames if name != "i")
        name = f"{step.__name__}_chain"
        attributes = dict(ain=step.ain, aout=step.aout, __doc__=step.__doc__, __module__=step.__module__)
        super().__init__(type(name, (), attributes))

    def _make_primitives(self) -> None:
        self.apl = Primitive(self, "apl", run_chain, self.argnames, run_chain_and_record)
        self.apl.defaults = {name: value for name, value in self.step._defaults.items() if name != "i"}
        cotangents, tangents = ["_" + name for name in self.aout], [name + "_" for name in self.ain]
        self.rcd = None
        self.inplace = {*self.state_names, *cotangents}
        # Make the derivatives of a chain
        self.vjp = Primitive(self, "vjp", pull_back_chain, [HISTORY, *cotangents])
        self.jvp = Primitive(self, "jvp", push_forward_chain, [HISTORY, *tangents])
        self.hvp = Primitive(self, "hvp", differentiate_vjp_of_chain, [HISTORY, *cotangents, *tangents])
        self._find_recorded()

    def _build(self, hyperargs: dict[str, Any]) -> Models:
        return Models(self.step, hyperargs)

    __call__: Any = AutoOperator.__call__

    def _open(self, names: tuple[str, ...]) -> Chain:
        if names not in self._opened:
            step = self.step._open(names)
            self._opened[names] = Chain(step, self.n, self.schedule, self.folder, self.comm)
        return self._opened[names]

    # What a chain makes anew
    def fresh_results(self, node: Any, plan: Any) -> Collection[str]:
        if node.primitive.kind != "vjp" or node.forward is None:
            return ()
        cotangents = ["_" + name for name in self.state_names]
        vout = tuple(cotangents + ["_" + name for name in wanted_parameters(node)])
        try:
            models = find_known_model(node.forward)
            if models is None:
                return ()
            tapes = [models[0]._plan(tuple(self.aout), True, True, (), results) for results in (True, False)]
            vjps = [models[0].derive(tape, "vjp")._plan(vout, False, True) for tape in tapes]
        except Exception:
            return ()  # the run will meet it again, and tell where
        return [name for name in cotangents if all(name in vjp.fresh_outputs for vjp in vjps)]

    # The actions of a chain
    @cached_property
    def actions(self) -> Actions:
        return Actions(self.schedule(self.n), self.n)


class Models:
    """The models of the steps of a chain, for some hyper-parameters."""

    def __init__(self, step: AutoOperator, hyperargs: dict[str, Any]) -> None:
        self._step, self._hyperargs = step, snapshot(hyperargs)
        self._numbered = "i" in step.argnames
        self._models: dict[int, Model] = {}

    def __getitem__(self, i: int) -> Model:
        key = i if self._numbered else 0
        if key not in self._models:
            hyperargs = {**self._hyperargs, "i": i} if self._numbered else self._hyperargs
            self._models[key] = self._step._build(hyperargs)
        return self._models[key]


class StepRuns:
    """The steps of a chain, with values for its parameters; on many ranks with what is known of where they live."""

    def __init__(
        self, chain: Chain, models: Models, parameters: dict[str, Any], placed: Mapping[str, Any], outer: Run
    ) -> None:
        self.chain, self.models, self.parameters = chain, models, parameters
        self.placed, self.outer = placed, outer

    def run(self, i: int, state: tuple[Any, ...], private: Names = ()) -> tuple[tuple[Any, ...], Names]:
        """Run a step; returns the next state and what of it is private."""
        model, vout, init = self.models[i], self.chain.aout, self.inputs(state)
        out, _ = model._run(vout, init, donated=private, placed=self.placed, run=Run(self.outer, i))
        arrivals = model.find_arrivals(init, self.placed)
        return tuple(out.values()), self.own(
            model._plan(tuple(vout), False, True, private, arrivals=arrivals)
        )

    def inputs(self, state: tuple[Any, ...]) -> dict[str, Any]:
        return {**self.parameters, **dict(zip(self.chain.state_names, state))}

    def own(self, plan: Plan) -> Names:
        """What of the next state nobody else holds, by its names as inputs."""
        return tuple(name for name, y in zip(self.chain.state_names, plan.vout) if y in plan.fresh_outputs)

    def record(
        self, i: int, state: tuple[Any, ...], private: Names = ()
    ) -> tuple[tuple[Any, ...], Names, Any]:
        """Run a step; returns the next state, what of it is private, and the tape."""
        tape = self.make_tape(i, state, private, True)
        own = self.own(tape.plan)
        return tuple(tape.let_go().values()), own, tape

    def record_only(self, i: int, state: tuple[Any, ...]) -> Any:
        """The tape of a step whose result nobody needs, for one sweep."""
        tape = self.make_tape(i, state, (), False)
        tape.consume()
        return tape

    def make_tape(self, i: int, state: tuple[Any, ...], private: Names, results: bool) -> Any:
        init, run = self.inputs(state), Run(self.outer, i)
        return self.models[i]._run(self.chain.aout, init, True, None, private, results, self.placed, run)[1]


def prepare(node: Any, arguments: dict[str, Any]) -> tuple[StepRuns, tuple[Any, ...]]:
    """The steps of the chain of a node, and the state that it begins with."""
    chain = node.operator
    models: Any
    models, inputs = find_model(node, arguments)
    parameters = {name: inputs[name] for name in chain.parameter_names}
    placed = {
        name: place
        for name, place in node.placed.items()
        if name in parameters or place.kind == "partitioned"  # a state may change its place from step to step
    }
    state = tuple(inputs[name] for name in chain.state_names)
    return StepRuns(chain, models, parameters, placed, run_inside(node)), state


def run_chain(node: Any, **arguments: Any) -> dict[str, Any]:
    steps, state = prepare(node, arguments)
    private = node.donated
    for i in range(steps.chain.n):
        state, private = steps.run(i, state, private)
    return dict(zip(steps.chain.aout, state))


class Runner:
    """Executes a schedule: knows the number of the next step, the state before it, and what is kept."""

    def __init__(self, steps: StepRuns, state: Any, disk: Disk, given: Names = ()) -> None:
        self.steps, self.disk, self.given = steps, disk, given
        self.at, self.state = 0, state
        self.private: Names = ()
        self.states: dict[tuple[str, int], InMemory | OnDisk] = {}
        self.tapes: dict[int, Any] = {}
        self.cotangents: Any = None

    def follow(self, actions: Sequence[Any]) -> None:
        for action, self.next in zip(actions, [*actions[1:], None]):
            getattr(self, type(action).__name__.lower())(action)

    def forward(self, action: Any) -> None:
        self.expect(action.n0)
        place = action.storage.name
        if action.write_ics:
            self.keep(place)
        for i in range(action.n0, min(action.n1, self.steps.chain.n)):
            # Run a step, with its tape or without
            if action.write_adj_deps and place == "DISK":
                self.keep(place)
            if action.write_adj_deps and place != "DISK":
                if i + 1 == action.n1 and type(self.next).__name__ == "Reverse":
                    self.state, self.tapes[i] = None, self.steps.record_only(i, self.state)
                else:
                    self.state, self.private, self.tapes[i] = self.steps.record(i, self.state, self.private)
            else:
                self.state, self.private = self.steps.run(i, self.state, self.private)
            self.at += 1

    # Keep a state, or bring it back
    def keep(self, place: str) -> None:
        if place == "DISK":
            self.states[place, self.at] = self.disk.keep(self.state)
            if self.at == 0:
                self.private = self.given
        else:
            self.states[place, self.at] = InMemory(self.state)
            self.private = ()

    def expect(self, n: int) -> None:
        if self.at != n:
            raise BadArgument(f"the schedule goes on at step {n}, but the chain is at step {self.at}")

    def copy(self, action: Any) -> None:
        kept = self.states.get((action.from_storage.name, action.n))
        if kept is None:
            if action.n not in self.tapes:
                raise BadArgument(f"the schedule wants back what it did not keep, of step {action.n}")
        elif action.to_storage.name == "WORK":
            self.at, self.state = action.n, kept.get()
            self.private = private_when_back(self.steps.chain, kept)
        elif action.to_storage.name != "NONE":
            moved = self.disk.keep(kept.get()) if action.to_storage.name == "DISK" else InMemory(kept.get())
            self.states[action.to_storage.name, action.n] = moved

    def move(self, action: Any) -> None:
        self.copy(action)
        self.states.pop((action.from_storage.name, action.n), None)

    # Sweep back over steps
    def reverse(self, action: Any) -> None:
        for i in action:
            self.cotangents.pull_back(self.take_tape(i))

    def take_tape(self, i: int) -> Any:
        state, self.state = self.state, None
        if i in self.tapes:
            return self.tapes.pop(i)
        self.expect(i)
        return self.steps.record_only(i, state)


def private_when_back(chain: Chain, kept: InMemory | OnDisk) -> Names:
    """What of a kept state nobody else holds when it comes back: all, if it is read from disk."""
    return tuple(chain.state_names) if isinstance(kept, OnDisk) else ()


def go_forward(steps: Any, start: Any, disk: Disk, given: Names = ()) -> Runner:
    """A runner from the start to the end of the forward run; what is `given` may be overwritten once it is on disk."""
    runner = Runner(steps, start, disk, given)
    runner.follow(steps.chain.actions.forward)
    runner.expect(steps.chain.n)
    return runner


def run_chain_and_record(node: Any, **arguments: Any) -> dict[str, Any]:
    steps, start = prepare(node, arguments)
    chain = steps.chain
    disk = Disk(chain.folder, chain.comm or find_comm(arguments.values()))
    runner = go_forward(steps, start, disk, node.donated)
    return {**dict(zip(chain.aout, runner.state)), HISTORY: History(runner, start)}


class Cotangents:
    """The cotangents of the state, pulled back from step to step, and the sums of those of the parameters.

    Parameters
    ----------
    chain : Chain
    of_state : list
        The cotangents of the last state.
    wanted : list of str
        The parameters whose cotangents somebody wants.
    private : tuple of str
        The cotangents of the state, by name, that may be overwritten.
    """

    form = "_{}"

    def __init__(self, chain: Chain, of_state: list[Any], wanted: list[str], private: Names = ()) -> None:
        self.chain, self.of_state, self.private = chain, of_state, private
        self.of_parameters: dict[str, Any] = dict.fromkeys(wanted, ZeroGradient)
        self._own: dict[str, Any] = dict.fromkeys(wanted)
        self.outnames = [self.form.format(name) for name in [*chain.state_names, *wanted]]
        self.steps_left = chain.n

    def pull_back(self, tape: Any) -> None:
        """Go back over a step."""
        cotangents = {"_" + name: value for name, value in zip(self.chain.aout, self.of_state)}
        vjp, vout = tape.get_vjp(), tuple(self.outnames)
        pulled, _ = vjp._run(vout, vjp._conforming(cotangents), donated=self.private)
        own = vjp._plan(vout, False, True, self.private).fresh_outputs
        self.private = tuple(name for name, x in zip(cotangents, pulled) if x in own)
        self.collect(list(pulled.values()))

    def collect(self, pulled: list[Any]) -> None:
        self.steps_left -= 1
        k = len(self.of_state)
        self.of_state = pulled[:k]
        for name, partial in zip(self.of_parameters, pulled[k:]):
            total, own = self.of_parameters[name], self._own[name]
            self.of_parameters[name], self._own[name] = add_cotangents(total, partial, own)

    def result(self) -> dict[str, Any]:
        """The cotangents of all inputs of the chain by name, also those that nobody wants."""
        found = {**dict(zip(self.chain.state_names, self.of_state)), **self.of_parameters}
        return {self.form.format(name): found.get(name, ZeroGradient) for name in self.chain.ain}


def wanted_parameters(node: Any) -> list[str]:
    return [name for name in node.operator.parameter_names if node.needs(name)]


class History:
    """What a chain records: the start, and what was kept up to the end of the forward run."""

    def __init__(self, runner: Runner, start: Any) -> None:
        self.steps, self.disk = runner.steps, runner.disk
        self.start = runner.states.get(("DISK", 0)) or InMemory(start)
        self._kept: tuple[dict[Any, Any], dict[int, Any]] | None = (runner.states, runner.tapes)

    def __repr__(self) -> str:
        kept = self._kept
        what = "used up" if kept is None else f"{len(kept[0])} states, {len(kept[1])} tapes"
        return f"history of {self.steps.chain.__name__}: {what}"

    # Say what a history has
    def literals(self) -> Iterator[tuple[Node, str, Any]]:
        """The constants of the steps, see `Tape`."""
        for model in self.steps.models._models.values():
            yield from literals(model)

    def held(self) -> list[Any]:
        """What it keeps in memory."""
        states, tapes = self._kept or ({}, {})
        kept = [self.start, *states.values()]
        return [*tapes.values(), *(state.get() for state in kept if isinstance(state, InMemory))]

    def go_back(self, cotangents: Cotangents) -> None:
        """Follow the actions back to the start, handing the tapes of the steps to `cotangents`."""
        chain = self.steps.chain
        # Complain if there is no way back
        if chain.actions.reverse is None:
            raise BrokenPrimitive(
                f"the schedule of {chain!r} keeps nothing for a reverse sweep; choose another than 'none'"
            )
        if self._kept is None:
            runner = go_forward(self.steps, self.start.get(), self.disk, private_when_back(chain, self.start))
        else:
            runner = Runner(self.steps, None, self.disk)
            runner.at = chain.n
            runner.states, runner.tapes = self._kept
        self._kept = (dict(runner.states), dict(runner.tapes)) if chain.actions.repeatable else None
        runner.cotangents = cotangents
        runner.follow(chain.actions.reverse)
        # Complain if steps are missing
        if cotangents.steps_left:
            raise BadArgument(f"the schedule leaves {cotangents.steps_left} of {chain.n} steps unswept")


def pull_back_chain(node: Any, **arguments: Any) -> dict[str, Any]:
    chain, of_state = node.operator, [arguments["_" + name] for name in node.operator.aout]
    cotangents = Cotangents(chain, of_state, wanted_parameters(node), node.donated)
    arguments[HISTORY].go_back(cotangents)
    return cotangents.result()


class StepRunsWithTangents:
    """The steps of a chain, on which a state takes its tangent along; a recorded tape, too."""

    def __init__(self, steps: StepRuns, arguments: dict[str, Any]) -> None:
        self.chain, self.steps = steps.chain, steps
        self.parameters = {name + "_": arguments[name + "_"] for name in steps.chain.parameter_names}

    def run(self, i: int, state: tuple[Any, Any], private: Names = ()) -> tuple[tuple[Any, Any], Names]:
        """Run a step: the next state and tangent, of which nothing is private."""
        return self.record(i, state)[0], ()

    def record(
        self, i: int, state: tuple[Any, Any], private: Names = ()
    ) -> tuple[tuple[Any, Any], Names, Any]:
        """Run a step: the next state and tangent, of which nothing is private, and the tape with the tangents before."""
        values, tangents = state
        out, _, tape = self.steps.record(i, values)
        of_state = {name + "_": tangent for name, tangent in zip(self.chain.state_names, tangents)}
        before = {**of_state, **self.parameters}
        pushed = tape.get_jvp().compute([name + "_" for name in self.chain.aout], before)
        return (out, tuple(pushed)), (), (tape, before)

    def record_only(self, i: int, state: tuple[Any, Any]) -> Any:
        return self.record(i, state)[2]


def with_tangents(node: Any, arguments: dict[str, Any]) -> tuple[StepRunsWithTangents, tuple[Any, Any]]:
    """The steps of a chain with tangents, and the state and tangent that they begin with."""
    history = arguments[HISTORY]
    tangents = tuple(arguments[name + "_"] for name in node.operator.state_names)
    return StepRunsWithTangents(history.steps, arguments), (history.start.get(), tangents)


def push_forward_chain(node: Any, **arguments: Any) -> dict[str, Any]:
    chain = node.operator
    steps, state = with_tangents(node, arguments)
    for i in range(chain.n):
        state, _ = steps.run(i, state)
    return {name + "_": tangent for name, tangent in zip(chain.aout, state[1])}


class Changes(Cotangents):
    """The changes of cotangents along a tangent, pulled back together with the cotangents."""

    form = "_{}_"

    def __init__(self, chain: Chain, of_state: list[Any], wanted: list[str]) -> None:
        super().__init__(chain, [ZeroGradient] * len(of_state), wanted)
        self.cotangents = of_state

    def pull_back(self, tape: Any) -> None:
        tape, tangents = tape
        given = {"_" + name: value for name, value in zip(self.chain.aout, self.cotangents)}
        given.update((f"_{name}_", value) for name, value in zip(self.chain.aout, self.of_state))
        wanted = ["_" + name for name in self.chain.state_names] + self.outnames
        pulled = tape.get_hvp().compute(wanted, {**given, **tangents})
        self.cotangents = pulled[: len(self.cotangents)]
        self.collect(pulled[len(self.cotangents) :])


def differentiate_vjp_of_chain(node: Any, **arguments: Any) -> dict[str, Any]:
    chain, of_state = node.operator, [arguments["_" + name] for name in node.operator.aout]
    steps, start = with_tangents(node, arguments)
    history = History(go_forward(steps, start, Disk(chain.folder, arguments[HISTORY].disk.comm)), start)
    changes = Changes(chain, of_state, wanted_parameters(node))
    history.go_back(changes)
    return changes.result()
