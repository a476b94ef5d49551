"""Chi-square problems on any number of ranks, their Gauss-Newton products, and inversions in epochs.

References: U. Seljak, G. Aslanyan, Y. Feng & C. Modi, JCAP 12 (2017) 009;
Y. Feng, U. Seljak & M. Zaldarriaga, JCAP 07 (2018) 043.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import numpy as np

from vmad_lit import Builder, autooperator, operator
from vmad_lit.contrib.optimize import (
    Accepted,
    ModelProblem,
    Monitor,
    Optimizer,
    Preconditioner,
    Problem,
    State,
)
from vmad_lit.contrib.vectorspace import Communicator, Vector, VectorSpace
from vmad_lit.contrib.vectorspace import MPIVectorSpace as MPIVectorSpace  # which users import from here
from vmad_lit.contrib.vectorspace import is_field, local_field_product, real_inner_product
from vmad_lit.core.arguments import whole_number
from vmad_lit.core.handover import duplicate
from vmad_lit.core.symbol import Symbol
from vmad_lit.lib import mpi


def local_product(a: Vector, b: Vector) -> float:
    """This rank's share of the inner product of two arrays, or two pmesh fields of one kind."""
    return local_field_product(a, b) if is_field(a) else real_inner_product(a, b)


@operator
class local_squares:
    """This rank's share of the sum of ``|x|^2``; summed over the ranks it is the whole."""

    ain = "x"
    aout = "y"

    def apl(node, x):
        return local_product(x, x)

    def vjp(node, _y, x):
        return dict(_x=x * (2.0 * float(_y)))

    def jvp(node, x_, x):
        return dict(y_=2.0 * local_product(x, x_))

    def hvp(node, _y, x_):
        return dict(_x_=x_ * (2.0 * float(_y)))


@autooperator
class MPIChiSquareOperator:
    """The sum of ``|x|^2`` over all elements on all ranks of `comm`, the same number on every rank."""

    ain = "x"
    aout = "y"

    def main(self, x: Symbol, comm: Communicator) -> dict[str, Symbol]:
        return dict(y=mpi.allreduce(local_squares(x), comm))


class MPIChiSquareProblem(ModelProblem):
    """The problem of minimising the sum of ``|R_i(F(s))|^2``.

    Parameters
    ----------
    comm :
        the communicator over which the residuals are spread; that of the forward operator and residuals.
    forward_operator :
        F, an operator of one input. Its outputs are the arguments of the residuals.
    residuals :
        list of the operators R_i, each with one output.
    vectorspace :
        the space of s; by default :class:`MPIVectorSpace`, for an s that is spread over the ranks.
    preconditioner, identity :
        as in :class:`~vmad_lit.contrib.optimize.Problem`.

    Attributes
    ----------
    model : Model
        from input ``x`` to the outputs ``y`` (the objective), ``r0, r1, ...`` and ``chisquare0, ...``.
    forwards : int
        how often the model was run forward.
    """

    def __init__(
        self,
        comm: Communicator,
        forward_operator: Callable[..., Any],
        residuals: Iterable[Callable[..., Any]],
        vectorspace: VectorSpace | None = None,
        preconditioner: Preconditioner | None = None,
        identity: Mapping[str, Any] | None = None,
    ) -> None:

        if not isinstance(residuals, Iterable):
            raise TypeError(f"residuals must be a list of operators, not {residuals!r}")
        residuals = list(residuals)
        if not residuals:
            raise ValueError("a chi-square problem needs at least one residual")
        for name, function in [
            ("forward_operator", forward_operator),
            *(("residuals", r) for r in residuals),
        ]:
            if not callable(function):
                raise TypeError(f"{name} must be operators, not {function!r}")
        if not hasattr(comm, "allreduce"):
            raise TypeError(f"comm must be a communicator, such as MPI.COMM_WORLD, not {comm!r}")

        self.comm, self.forward_operator, self.residuals = comm, forward_operator, residuals
        # Build the model of the objective
        with Builder() as m:
            fs = forward_operator(m.input("x"))
            fs = fs if isinstance(fs, (list, tuple)) else [fs]
            r = [residual(*fs) for residual in residuals]
            chisquare = [MPIChiSquareOperator(ri, comm) for ri in r]
            outputs = {f"r{i}": ri for i, ri in enumerate(r)}
            outputs.update((f"chisquare{i}", ci) for i, ci in enumerate(chisquare))
            m.output(y=sum(chisquare[1:], start=chisquare[0]), **outputs)
        vs = MPIVectorSpace(comm) if vectorspace is None else vectorspace
        names = [f"r{i}" for i in range(len(residuals))]
        super().__init__(m, "y", "x", names, vs, preconditioner, identity)

    def ingredients(self) -> dict[str, Any]:
        """The operators with their hyper-parameters, besides what all problems have."""
        own = dict(forward=self.forward_operator, residuals=self.residuals)
        return {**Problem.ingredients(self), **own}

    def chisquares(self, x: Vector) -> list[float]:
        """The sum of squares of each residual at x."""
        out = self._tape_at(x).out
        return [float(out[f"chisquare{i}"]) for i in range(len(self.residuals))]

    def residual_values(self, x: Vector) -> list[Any]:
        """The residuals at x, this rank's part of them."""
        out = self._tape_at(x).out
        return [duplicate(out[name]) for name in self.residual_names]


class EpochScheduler(dict[int, dict[str, Any]]):
    """Parameters that change from epoch to epoch: a dictionary of the changes by epoch.

    ``scheduler('maxiter', [5, 10, 50])`` gives one value an epoch, ``scheduler('scale', {0: 4.0, 2: 0.0})``
    a step function, and ``scheduler('gtol', 1e-3)`` a value from the start.
    """

    def __call__(self, argname: str, values: Any) -> None:
        """Short for :meth:`schedule`."""
        self.schedule(argname, values)

    def schedule(self, argname: str, values: Any) -> None:
        """Set the values of the parameter `argname`: a list, a dictionary by epoch, or one value."""
        if isinstance(values, (list, tuple)):
            values = dict(enumerate(values))
        elif not isinstance(values, dict):
            values = {0: values}
        for epoch, value in values.items():
            if isinstance(epoch, bool) or not isinstance(epoch, (int, np.integer)) or epoch < 0:
                raise ValueError(f"epochs are counted 0, 1, 2, ...; {argname!r} is scheduled for {epoch!r}")
            self.setdefault(int(epoch), {})[argname] = value

    @property
    def min_nepochs(self) -> int:
        """The number of epochs that reaches the last change, at least 1."""
        return max(self, default=0) + 1

    def get_args(self, epoch: int) -> dict[str, Any]:
        """The parameters in an epoch, as if all epochs before had been played."""
        epoch, args = whole_number("epoch", epoch, least=0), {}
        for change in sorted(self):
            if change <= epoch:
                args.update(self[change])
        return args

    @property
    def epochs(self) -> list[dict[str, Any]]:
        """The parameters in each epoch, as :func:`~vmad_lit.contrib.optimize.minimize_in_epochs` takes them."""
        return [self.get_args(epoch) for epoch in range(self.min_nepochs)]


class Epoch:
    """Which epoch of how many: what a monitor of epochs is given."""

    def __init__(self, epoch: int, nepochs: int) -> None:
        self.epoch, self.nepochs = epoch, nepochs

    def __repr__(self) -> str:
        return f"Epoch {self.epoch} / {self.nepochs}"


# Watch an epoch
def in_epoch(epoch: int, monitor: Monitor | None) -> Monitor:
    """A monitor that notes the epoch in the state and then asks another one, if there is any."""

    def watch(state: State) -> object:
        state["epoch"] = epoch
        state["history"][-1]["epoch"] = epoch
        return monitor(state) if monitor else None

    return watch


class MAPInversion:
    """Find the most probable signal behind data, in several epochs.

    Subclasses override :meth:`problem_factory`.

    Parameters
    ----------
    optimizer :
        an :class:`~vmad_lit.contrib.optimize.Optimizer`.
    ForwardOperator :
        the forward operator, for the use of `problem_factory`.

    Attributes
    ----------
    schedule_optimizer : EpochScheduler
        the options of the optimiser.
    schedule_problem : EpochScheduler
        the arguments of `problem_factory` besides the data.
    states : list of State
        the final state of each epoch of the last :meth:`apply`.
    """

    def __init__(self, optimizer: Optimizer, ForwardOperator: Any) -> None:
        if not hasattr(optimizer, "minimize"):
            raise TypeError(f"optimizer must be an optimiser, such as LBFGS(), not {optimizer!r}")
        self.optimizer = optimizer
        self.ForwardOperator = ForwardOperator
        self.schedule_optimizer = EpochScheduler()
        self.schedule_problem = EpochScheduler()
        self.states: list[State] = []

    def problem_factory(self, d: Any, **args: Any) -> Problem:
        """The problem for the data `d` and the scheduled parameters; to be overridden."""
        raise NotImplementedError(
            f"{type(self).__name__} must define problem_factory(self, d, ...), which returns a problem"
        )

    @property
    def nepochs(self) -> int:
        """The number of epochs that both schedules ask for."""
        return max(self.schedule_optimizer.min_nepochs, self.schedule_problem.min_nepochs)

    def get_problem(self, d: Any, epoch: int = 0) -> Problem:
        """The problem of one epoch."""
        return self.problem_factory(d=d, **self.schedule_problem.get_args(epoch))

    def apply(
        self,
        d: Any,
        s0: Vector,
        epochs: Iterable[int] | None = None,
        monitor_epoch: Callable[[Epoch], object] | None = None,
        monitor_progress: Monitor | None = None,
        progress: bool = False,
        state: State | None = None,
        accept: Accepted = False,
    ) -> Vector:
        """Invert the data `d`, starting from the signal `s0`.

        Parameters
        ----------
        epochs : list of int
            the epochs to run; all of them by default.
        monitor_epoch :
            called with an :class:`Epoch` at the beginning of each.
        monitor_progress :
            called with the state of the optimiser after each iteration.
        progress : bool
            show a progress bar for each epoch.
        state : State
            a state that was saved by a monitor, to go on from: its epoch is continued, and those before it are not run.
        accept :
            what may have changed since that state was saved; see `Optimizer.minimize`.

        Returns
        -------
        the most probable signal
        """

        epochs = list(range(self.nepochs) if epochs is None else epochs)
        epochs = [whole_number("epochs", epoch, least=0) for epoch in epochs]
        s1, self.states, options = s0, [], dict(vars(self.optimizer))
        bar: dict[str, Any] = {"progress": True} if progress else {}
        more: dict[str, Any] = {} if state is None else {"state": state, "accept": accept}
        begun = None if state is None else state.epoch
        if begun is not None and begun not in epochs:
            raise ValueError(f"the state is in epoch {begun}, which is none of those to run, {epochs}")
        try:
            for epoch in epochs[0 if begun is None else epochs.index(begun) :]:
                if monitor_epoch:
                    monitor_epoch(Epoch(epoch, max(epochs) + 1))
                problem = self.get_problem(d, epoch)
                vars(self.optimizer).update(self._options(epoch))
                watch = in_epoch(epoch, monitor_progress)
                state = self.optimizer.minimize(problem, s1, monitor=watch, **bar, **more)
                self.states.append(state)
                s1, more = state["x"], {}
                if getattr(state, "status", "") == "signal":
                    break
        finally:
            vars(self.optimizer).clear()
            vars(self.optimizer).update(options)
        return s1

    def _options(self, epoch: int) -> dict[str, Any]:
        """The options of the optimiser in an epoch, checked."""
        args = self.schedule_optimizer.get_args(epoch)
        known = self.optimizer.options() if hasattr(self.optimizer, "options") else args
        for name in args:
            if name not in known:
                raise ValueError(
                    f"the optimiser has no option {name!r} to be scheduled; it has {', '.join(known)}"
                )
        return args

    @classmethod
    def create_like(cls, other: MAPInversion, epochs: Iterable[int] | None = None) -> Self:
        """A new inversion with the attributes and schedules of `other`, or only these epochs of them."""
        self = object.__new__(cls)
        vars(self).update(vars(other))
        self.states = []
        for name in "schedule_optimizer", "schedule_problem":
            schedule = getattr(other, name)
            if epochs is None:
                chosen = {epoch: dict(args) for epoch, args in schedule.items()}
            else:
                chosen = {i: schedule.get_args(epoch) for i, epoch in enumerate(epochs)}
            copy = EpochScheduler()
            copy.update(chosen)
            setattr(self, name, copy)
        return self
