"""Long chains of steps, whose derivatives remember a few states and recompute the rest."""

import pickle
import tempfile

from .autodiff import accumulate
from .autooperator import AutoOperator
from .error import BadArgument
from .operator import Operator, Primitive, ZeroGradient

HISTORY = "history of the chain"


def checkpoint(step, n, ram=None, disk=0, folder=None, schedule=None):
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
        How many states may be kept in memory (by default all) and on disk. At least one in all.
    folder : str, optional
        Where to put the states on disk; by default where temporary files go. The files have no names
        and vanish with the process, even if it is killed.
    schedule : callable, optional
        From `n` to a schedule of the library `checkpoint_schedules`, instead of the optimal one for
        `ram` and `disk`.

    Returns
    -------
    Operator
        With the inputs, outputs and hyper-parameters of the step, except `i`.
    """
    # Check the step and the numbers
    if not isinstance(step, AutoOperator):
        raise BadArgument(f"the step of a chain is an autooperator, got {step!r}")
    if len(step.aout) > len(step.ain):
        raise BadArgument(
            f"the outputs {list(step.aout)} of a step are its next state, "
            f"but it has only the inputs {list(step.ain)}"
        )
    if n < 1:
        raise BadArgument(f"a chain has at least one step, got n = {n}")
    if schedule is None and ram is not None and ram + disk < 1:
        raise BadArgument("at least one state must be kept, in memory or on disk; got ram = 0 and disk = 0")
    return Chain(step, n, schedule or optimal(ram, disk), folder)


def optimal(ram, disk):
    """The schedule with the fewest recomputed steps for a number of states in memory and on disk."""

    def schedule(n):
        try:
            from checkpoint_schedules import MultistageCheckpointSchedule
        except ImportError:
            raise ImportError("checkpoint needs the package checkpoint_schedules") from None
        return MultistageCheckpointSchedule(n, min(n, n if ram is None else ram), min(n, disk))

    return schedule


class Chain(Operator):
    """A chain of steps as an operator; made by `checkpoint`."""

    collective = True  # there may be collective operators in the steps

    def __init__(self, step, n, schedule, folder):
        self.step, self.n, self.schedule, self.folder = step, n, schedule, folder
        self.state_names = list(step.ain)[: len(step.aout)]
        self.parameter_names = list(step.ain)[len(step.aout) :]
        self.argnames = tuple(name for name in step.argnames if name != "i")
        name = f"{step.__name__}_chain"
        attributes = dict(ain=step.ain, aout=step.aout, __doc__=step.__doc__, __module__=step.__module__)
        super().__init__(type(name, (), attributes))

    def _make_primitives(self):
        self.apl = Primitive(self, "apl", run_chain, self.argnames, run_chain_and_record)
        self.apl.defaults = {name: value for name, value in self.step._defaults.items() if name != "i"}
        self.vjp = Primitive(self, "vjp", pull_back_chain, [HISTORY, *("_" + name for name in self.aout)])
        self.jvp = Primitive(self, "jvp", push_forward_chain, [HISTORY, *(name + "_" for name in self.ain)])
        self.rcd = None
        self._find_recorded()

    __call__ = AutoOperator.__call__

    def _open(self, names: tuple[str, ...]) -> Operator:
        return Chain(self.step._open(names), self.n, self.schedule, self.folder)


class Steps:
    """The models of the steps of a chain, and how to run one of them."""

    def __init__(self, chain, arguments):
        self.chain = chain
        self.parameters = {name: arguments[name] for name in chain.parameter_names}
        self.hyperargs = {name: arguments[name] for name in chain.argnames if name not in chain.ain}
        self.models = {}

    def model(self, i):
        numbered = "i" in self.chain.step.argnames
        key = i if numbered else 0
        if key not in self.models:
            self.models[key] = self.chain.step._build({**self.hyperargs, **(dict(i=i) if numbered else {})})
        return self.models[key]

    def run(self, i, state, record=False):
        """Run a step; returns the next state, and the tape or None."""
        init = {**self.parameters, **dict(zip(self.chain.state_names, state))}
        out, tape = self.model(i)._run(self.chain.aout, init, record)
        return tuple(out.values()), tape


def find_steps(node, arguments):
    home, steps = node.forward or node, Steps(node.operator, arguments)
    if home.cache is not None:
        hyperargs, models = home.cache
        if all(hyperargs[name] is value for name, value in steps.hyperargs.items()):
            steps.models = models
    home.cache = steps.hyperargs, steps.models
    return steps


def run_chain(node, **arguments):
    chain, steps = node.operator, find_steps(node, arguments)
    state = tuple(arguments[name] for name in chain.state_names)
    for i in range(chain.n):
        state, _ = steps.run(i, state)
    return dict(zip(chain.aout, state))


class Walk:
    """The execution of a schedule: where we are, the states that are kept, and the tapes at hand."""

    def __init__(self, steps, state, states=(), tapes=()):
        self.steps = steps
        self.state = state
        self.states = dict(states)
        self.tapes = dict(tapes)

    def forward(self, action):
        from checkpoint_schedules import StorageType

        if action.write_ics:
            on_disk = action.storage is StorageType.DISK
            folder = self.steps.chain.folder
            self.states[action.n0] = OnDisk(self.state, folder) if on_disk else InMemory(self.state)
        for i in range(action.n0, min(action.n1, self.steps.chain.n)):
            self.state, tape = self.steps.run(i, self.state, action.write_adj_deps)
            if tape is not None:
                self.tapes[i] = tape

    def restore(self, action, keep):
        if action.n in self.states:  # otherwise it is about a tape, which we have at hand
            kept = self.states[action.n] if keep else self.states.pop(action.n)
            self.state = kept.get()


class InMemory:
    """A state that is kept in memory."""

    def __init__(self, state):
        self._state = state

    def get(self):
        return self._state


class OnDisk:
    """A state that is kept in an anonymous temporary file."""

    def __init__(self, state, folder):
        try:
            self._file = tempfile.TemporaryFile(dir=folder)
            pickle.dump(state, self._file, protocol=5)
            self._file.flush()
        except OSError as error:
            where = folder or tempfile.gettempdir()
            raise OSError(
                error.errno, f"a state of a chain could not be written to {where}: {error.strerror}"
            ) from error
        except (TypeError, pickle.PicklingError, AttributeError) as error:
            raise TypeError(
                "a state of a chain cannot be kept on disk, since it cannot be pickled "
                f"({error}); keep it in memory"
            ) from error

    def get(self):
        self._file.seek(0)
        return pickle.load(self._file)


def actions_of(chain):
    """The actions of the schedule of a chain, one after the other."""
    schedule = chain.schedule(chain.n)
    for action in schedule:
        yield action
        if schedule.max_n is None and getattr(action, "n1", 0) >= chain.n:
            schedule.finalize(chain.n)


class History:
    """What a chain records: the kept states and tapes at the end of the forward run, and how to run steps."""

    def __init__(self, walk, start):
        self.steps, self.states, self.tapes = walk.steps, walk.states, walk.tapes
        self.start = self.states.get(0) or InMemory(start)


def run_chain_and_record(node, **arguments):
    from checkpoint_schedules import EndForward

    chain = node.operator
    start = tuple(arguments[name] for name in chain.state_names)
    walk = Walk(find_steps(node, arguments), start)
    for action in actions_of(chain):
        if isinstance(action, EndForward):
            break
        walk.forward(action)
    return {**dict(zip(chain.aout, walk.state)), HISTORY: History(walk, start)}


def pull_back_chain(node, **arguments):
    from checkpoint_schedules import Copy, EndForward, EndReverse, Forward, Move, Reverse

    chain, history = node.operator, arguments[HISTORY]
    cotangents = [arguments["_" + name] for name in chain.aout]
    of_parameters = dict.fromkeys(chain.parameter_names, ZeroGradient)
    walk = Walk(history.steps, None, history.states, history.tapes)
    actions = actions_of(chain)
    while not isinstance(next(actions), EndForward):
        pass
    for action in actions:
        if isinstance(action, Reverse):
            for i in reversed(range(action.n0, action.n1)):
                # Pull the cotangents back through a step
                tape = walk.tapes.pop(i)
                pulled = tape.get_vjp().compute(
                    ["_" + name for name in chain.ain], {"_" + name: c for name, c in zip(chain.aout, cotangents)}
                )
                cotangents = pulled[: len(cotangents)]
                for name, partial in zip(of_parameters, pulled[len(cotangents) :]):
                    of_parameters[name] = accumulate.apl.impl(None, of_parameters[name], partial)
        elif isinstance(action, Forward):
            walk.forward(action)
        elif isinstance(action, (Copy, Move)):
            walk.restore(action, keep=isinstance(action, Copy))
        elif isinstance(action, EndReverse):
            break
    return {
        "_" + name: value for name, value in [*zip(chain.state_names, cotangents), *of_parameters.items()]
    }


def push_forward_chain(node, **arguments):
    chain, history = node.operator, arguments[HISTORY]
    state = history.start.get()
    tangents = [arguments[name + "_"] for name in chain.state_names]
    of_parameters = {name + "_": arguments[name + "_"] for name in chain.parameter_names}
    for i in range(chain.n):
        state, tape = history.steps.run(i, state, record=True)
        init = {**of_parameters, **{name + "_": t for name, t in zip(chain.state_names, tangents)}}
        tangents = tape.get_jvp().compute([name + "_" for name in chain.aout], init)
    return {name + "_": tangent for name, tangent in zip(chain.aout, tangents)}
