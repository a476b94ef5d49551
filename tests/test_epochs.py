"""Validation, the best point, and minimisation in epochs: on several ranks, saved, killed and resumed."""

import json
import math
import os

import numpy as np
import pytest
from mpi4py import MPI
from numpy.testing import assert_array_equal
from scipy.optimize import rosen, rosen_der

from helpers import split
from vmad_lit.contrib.chisquare import EpochScheduler, MAPInversion, MPIVectorSpace
from vmad_lit.contrib.optimize import (
    LBFGS,
    Best,
    GradientDescent,
    Preconditioner,
    Problem,
    State,
    StateError,
    TrustRegionCG,
    Validation,
    autosave,
    minimize_in_epochs,
)
from vmad_lit.contrib.vectorspace import VectorSpace

COMM = MPI.COMM_WORLD
c = split(np.arange(1.0, 13.0))


def spread(width=1.0, vs=None):
    """A problem of unknowns that are spread over the ranks."""
    vs = MPIVectorSpace(COMM) if vs is None else vs
    value = lambda x: vs.dot(x, c * x) / width + vs.dot(x, x) ** 2
    slope = lambda x: 2 * c * x / width + 4 * vs.dot(x, x) * x
    return Problem(value, slope, vs=vs, identity=dict(width=width))


def test_a_validation_is_asked_and_told():
    asked = []

    def likes(x):
        asked.append(x.copy())
        return float(np.sum((x - 0.5) ** 2))

    seen = []
    start = np.tile([-1.2, 1.0], 2)
    options = dict(monitor=lambda state: seen.append((state.nit, state.validation)), keep_best=True)
    state = LBFGS().minimize(
        Problem(rosen, rosen_der), start, validation=Validation(likes, every=3), **options
    )
    assert len(asked) == state.nit // 3 + 1 and [value is None for nit, value in seen] == [
        nit % 3 > 0 for nit, _ in seen
    ]
    column = state.history["validation"]
    assert_array_equal(np.isnan(column), np.arange(state.nit + 1) % 3 > 0)
    assert state.best.validation == np.nanmin(column) == likes(
        state.best.x
    ) and state.best.nit == np.nanargmin(column)
    assert state.best.y == rosen(state.best.x)
    lines = str(state.history).splitlines()
    assert (
        lines[0].endswith("validation")
        and lines[1].split()[-1] == f"{column[0]:.7e}"
        and len(set(map(len, lines))) == 1
    )
    assert "<th>validation</th>" in state.history._repr_html_()
    # Watching changes nothing
    assert_array_equal(LBFGS().minimize(Problem(rosen, rosen_der), start).x, state.x)


@pytest.mark.parametrize(
    "optimizer", [LBFGS(), GradientDescent(barzilai_borwein=False, window=1), TrustRegionCG()]
)
def test_patience_is_lost_with_every_optimiser(optimizer):
    bowl = Problem(lambda x: float(np.sum(x**4)), lambda x: 4 * x**3, lambda x, v: 12 * x**2 * v)
    state = optimizer.minimize(bowl, np.array([5.0, 4.0]), validation=Validation(bowl.objective, patience=2))
    assert state.status != "validation"
    opposite = Validation(lambda x: -float(np.sum(x**2)), patience=2)
    state = optimizer.minimize(bowl, np.array([5.0, 4.0]), validation=opposite)
    assert (state.status, state.nit) == ("validation", 2) and "below -41 for 2 values" in state.message
    # A state that has lost patience does not go on
    assert optimizer.minimize(bowl, state=state, validation=opposite).nit == 2
    assert optimizer.minimize(bowl, state=state).nit > 2


def test_what_is_no_number_is_never_the_best():
    values = iter([math.nan, 3.0, math.inf, 2.0, math.nan, 5.0, 4.0])
    bowl = Problem(lambda x: float(np.sum(x**4)), lambda x: 4 * x**3)
    state = LBFGS().minimize(
        bowl, np.ones(2), validation=Validation(lambda x: next(values), patience=3), keep_best=True
    )
    assert (state.status, state.nit, state.best.nit, state.best.validation) == ("validation", 6, 3, 2.0)


def test_the_best_objective_without_a_validation():
    start = np.tile([-1.2, 1.0], 2)
    optimizer = GradientDescent(maxiter=60)
    heights = []
    state = optimizer.minimize(
        Problem(rosen, rosen_der), start, keep_best=True, monitor=lambda s: heights.append(s.y)
    )
    assert (
        state.best.y == min(heights)
        and state.best.nit == np.argmin(heights)
        and state.best.validation is None
    )
    state.x[:] = 0
    assert rosen(state.best.x) == state.best.y


@pytest.mark.parametrize("bad", [dict(every=0), dict(patience=0), dict(patience=1.5)])
def test_validations_that_make_no_sense(bad):
    with pytest.raises(ValueError, match="whole number"):
        Validation(rosen, **bad)
    with pytest.raises(TypeError, match="a function of x"):
        LBFGS().minimize(Problem(rosen, rosen_der), np.ones(2), validation=3.0)


@pytest.mark.collective
@pytest.mark.parametrize("whiten", [False, True])
def test_the_best_is_saved_and_resumed(folder, whiten):
    def problem():
        made = spread()
        made.preconditioner = Preconditioner.diagonal(c**0.5) if whiten else None
        return made

    vs, path = problem().vs, os.path.join(folder, "state.npz")
    likes = Validation(lambda x: vs.dot(x - 0.3, x - 0.3), every=2, patience=3)
    start = np.ones(len(c))
    options = dict(validation=likes, keep_best=True)
    whole = LBFGS(gtol=1e-12).minimize(problem(), start, **options)
    LBFGS(gtol=1e-12, maxiter=3).minimize(problem(), start, **options).save(path)
    loaded = State.load(path, vs, start, problem())
    assert loaded.best.numbers().keys() == {"y", "nit", "validation", "epoch"}
    again = LBFGS(gtol=1e-12).minimize(problem(), state=loaded, **options)
    assert (again.status, again.nit) == (whole.status, whole.nit) and whole.status == "validation"
    assert again.best.numbers() == whole.best.numbers()
    assert_array_equal(again.best.x, whole.best.x)
    assert_array_equal(again.history["validation"], whole.history["validation"])


@pytest.mark.collective
def test_a_validation_that_is_not_reduced_is_refused():
    problem = spread()
    if COMM.size > 1:
        with pytest.raises(ValueError, match="differs between ranks"):
            LBFGS().minimize(problem, np.ones(len(c)), validation=lambda x: float(COMM.rank))
    assert LBFGS().minimize(problem, np.ones(len(c)), validation=problem).validation is not None


def test_a_damaged_best_point_is_told(folder):
    path = os.path.join(folder, "state.npz")
    LBFGS(maxiter=2).minimize(Problem(rosen, rosen_der), np.zeros(2), keep_best=True).save(path)
    for wrong in ({"y": "1"}, {"nit": -1}, {"validation": math.nan}, {"more": 1}):
        with np.load(path) as file:
            arrays = dict(file)
        header = json.loads(str(arrays["state"]))
        header["best"] = header["best"] | wrong
        arrays["state"] = np.array(json.dumps(header))
        other = os.path.join(folder, "other.npz")
        np.savez(other, **arrays)
        with pytest.raises(StateError, match="damaged"):
            State.load(other, VectorSpace(), np.zeros(2))
    assert Best.holds(dict(y=1.0, nit=2, validation=None, epoch=0))


EPOCHS = [dict(width=8.0, maxiter=4, gtol=1e-12), dict(width=4.0, maxiter=4), dict(gtol=1e-9)]


class Killed(Exception):
    pass


@pytest.mark.collective
@pytest.mark.parametrize("last", [6, 8])
def test_a_run_that_is_killed_goes_on_in_its_epoch(folder, last):
    path, start = os.path.join(folder, "run.npz"), np.ones(len(c))

    def kill(state):
        if state.nit == last:
            raise Killed

    whole = minimize_in_epochs(LBFGS(), spread, EPOCHS, start)
    assert whole.converged and whole.epoch == 2
    assert_array_equal(np.bincount(whole.history["epoch"].astype(int))[:2], [5, 4])
    with pytest.raises(Killed):
        minimize_in_epochs(LBFGS(), spread, EPOCHS, start, monitor=[autosave(path, every=1), kill])
    state = State.resume(path, MPIVectorSpace(COMM), like=start)
    assert (state.nit, state.epoch) == (last, 0 if last <= 4 else 1 if last <= 8 else 2)
    again = minimize_in_epochs(LBFGS(), spread, EPOCHS, start, state=state)
    assert (again.nit, again.gev - again.fev) == (whole.nit, whole.gev - whole.fev)
    assert_array_equal(again.x, whole.x)
    assert_array_equal(again.history["epoch"], whole.history["epoch"])
    assert_array_equal(again.history["y"], whole.history["y"])


@pytest.mark.collective
def test_a_state_of_another_list_of_epochs_is_refused(folder):
    path, start = os.path.join(folder, "run.npz"), np.ones(len(c))
    minimize_in_epochs(LBFGS(), spread, EPOCHS, start, monitor=lambda state: state.nit == 6).save(path)
    vs = MPIVectorSpace(COMM)
    with pytest.raises(StateError, match="problem.width"):
        minimize_in_epochs(LBFGS(), spread, [{}, dict(width=3.0)], state=State.load(path, vs, start))
    with pytest.raises(StateError, match="in epoch 1, and there are only 1"):
        minimize_in_epochs(LBFGS(), spread, [{}], state=State.load(path, vs, start))
    state = minimize_in_epochs(
        LBFGS(), spread, [{}, dict(width=3.0)], state=State.load(path, vs, start), accept="problem.width"
    )
    assert state.converged and state.epoch == 1


@pytest.mark.parametrize(
    "epochs, words",
    [
        ([{}, dict(widht=1.0)], "epoch 1: .*did you mean 'width'"),
        ([dict(maxitr=3)], "did you mean 'maxiter'"),
        ([dict(maxiter=-3)], "LBFGS's maxiter"),
        (["width"], "must be a dictionary"),
        ([], "at least"),
    ],
)
def test_mistakes_are_found_before_anything_runs(epochs, words):
    def never(width=1.0):
        raise AssertionError

    with pytest.raises((TypeError, ValueError), match=words):
        minimize_in_epochs(LBFGS(), never, epochs, np.ones(2))


def test_a_required_argument_is_asked_for():
    with pytest.raises(TypeError, match="epoch 1: missing a required argument: 'width'"):
        minimize_in_epochs(LBFGS(), lambda width: spread(width), [dict(width=1.0), {}], np.ones(2))


def test_the_optimiser_is_left_as_it_was():
    optimizer = LBFGS(maxiter=7)
    minimize_in_epochs(
        optimizer, lambda: Problem(rosen, rosen_der), [dict(maxiter=2, m=3), dict(maxiter=1)], np.zeros(2)
    )
    assert (optimizer.maxiter, optimizer.m) == (7, 10)


def test_the_best_of_another_objective_does_not_count():
    problem = lambda offset=0.0: Problem(
        lambda x: float(x @ x) + offset, lambda x: 2 * x, identity=dict(offset=offset)
    )
    state = minimize_in_epochs(
        GradientDescent(), problem, [dict(offset=-9.0), dict(offset=3.0)], np.ones(2), keep_best=True
    )
    assert state.best.y >= 3.0 and state.best.epoch == 1
    state = minimize_in_epochs(
        GradientDescent(),
        problem,
        [dict(offset=-9.0), dict(offset=3.0)],
        np.ones(2),
        keep_best=True,
        validation=lambda x: -float(x @ x),
    )
    assert (state.best.nit, state.best.epoch) == (0, 0)


class Chase(MAPInversion):
    def problem_factory(self, d, width):
        return spread(width)


@pytest.mark.collective
def test_an_inversion_goes_on_from_a_state(folder):
    path, start = os.path.join(folder, "run.npz"), np.ones(len(c))
    chase = Chase(LBFGS(), None)
    chase.schedule_problem("width", [8.0, 4.0, 1.0])
    chase.schedule_optimizer("maxiter", {0: 4, 2: 50})
    whole = chase.apply(None, start)
    last = chase.states[-1]

    def kill(state):
        if (state.epoch, state.nit) == (1, 2):
            raise Killed

    def watch(state):
        autosave(path, every=1)(state)
        kill(state)

    with pytest.raises(Killed):
        chase.apply(None, start, monitor_progress=watch)
    state = State.load(path, MPIVectorSpace(COMM), start)
    assert (state.epoch, state.nit) == (1, 2)
    assert_array_equal(chase.apply(None, start, state=state), whole)
    assert [state.epoch for state in chase.states] == [1, 2] and chase.states[-1].nit == last.nit
    with pytest.raises(ValueError, match="the state is in epoch 1"):
        chase.apply(None, start, epochs=[0], state=State.load(path, MPIVectorSpace(COMM), start))
    # A schedule as a list of epochs
    schedule = EpochScheduler()
    schedule("width", [8.0, 4.0, 1.0])
    schedule("maxiter", {0: 4, 2: 50})
    assert minimize_in_epochs(LBFGS(), spread, schedule.epochs, start).epoch == 2
