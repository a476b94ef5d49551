"""What fails on one rank fails on all, and ranks that are apart find each other."""

import numpy as np
import pytest

pytest.importorskip("mpi4py")
from mpi4py import MPI

from vmad_lit import Builder
from vmad_lit.core.agreement import describe_value
from vmad_lit.core.error import Disagreement
from vmad_lit.core.meeting import Place, channel_of, watched
from vmad_lit.core.together import any_rank, raise_together, together
from vmad_lit.lib import linalg, mpi

pytestmark = pytest.mark.collective

COMM = MPI.COMM_WORLD
LAST = COMM.size - 1
BAD = COMM.rank == LAST
several = pytest.mark.skipif(COMM.size == 1, reason="needs ranks that differ")


def fails(error):
    """An action that fails on the last rank."""

    def action():
        if BAD:
            raise error
        return COMM.rank

    return action


def caught(action, kind):
    with pytest.raises(kind) as found:
        together(COMM, action)
    assert type(found.value) is kind
    return found.value


def test_what_succeeds_is_returned():
    assert together(COMM, lambda: COMM.rank) == COMM.rank
    assert together(None, lambda: 5) == 5


def test_an_error_has_its_type_and_names_its_rank():
    for error in ValueError("a", 1), KeyError("k"), OSError(28, "No space left on device", "f"), Exception():
        found = caught(fails(error), type(error))
        assert COMM.size == 1 or f"on rank {LAST}" in str(found) + str(getattr(found, "__notes__", ""))
        assert COMM.size == 1 or len(set(COMM.allgather(str(found)))) == 1
    found = caught(fails(FileNotFoundError(2, "No such file", "f")), FileNotFoundError)
    assert (found.errno, found.filename) == (2, "f")


@several
def test_the_cause_is_the_original_or_its_traceback():
    error = ValueError("bad news")
    found = caught(fails(error), ValueError)
    if BAD:
        assert found.__cause__ is error
    else:
        assert "raise error" in str(found.__cause__) and "bad news" in str(found.__cause__)


@several
def test_an_exception_that_cannot_be_sent():
    class Odd(Exception):
        def __init__(self, a, b):
            super().__init__(a + b)

    found = caught(fails(Odd("bad ", "news")), RuntimeError)
    assert str(found) == f"on rank {LAST}: test_an_exception_that_cannot_be_sent.<locals>.Odd: bad news"


def test_an_error_of_all_ranks_is_raised_as_it_is():
    error = ValueError("bad news")
    with pytest.raises(ValueError) as found:
        raise_together(COMM, error)
    assert found.value is error


@several
def test_errors_that_differ_are_all_told():
    def action():
        raise ValueError(f"news of {COMM.rank}")

    found = caught(action, ValueError)
    assert str(found) == "on rank 0: news of 0"
    assert found.__notes__[0] == "and on rank 1: ValueError: news of 1"


@several
def test_ranks_at_different_places_find_each_other():
    channel = channel_of(COMM)
    with pytest.raises(Disagreement, match=f"rank {LAST}: over there"):
        channel.meet(False, Place(1 + BAD, "over there" if BAD else "here"))
    assert any_rank(COMM, BAD) and not any_rank(COMM, False)


def test_a_rank_alone_meets_nobody():
    assert channel_of(MPI.COMM_SELF) is None and COMM.size > 0
    if BAD:  # and none of the others
        with Builder() as m:
            m.output(y=mpi.allreduce(m.input("x"), MPI.COMM_SELF))
        assert m.compute("y", dict(x=2.0)) == 2.0


@pytest.mark.skipif(COMM.size < 3, reason="needs a part of the ranks")
def test_a_part_of_the_ranks_meets_by_itself():
    part = COMM.Split(int(COMM.rank > 0))
    if COMM.rank:
        assert channel_of(part) is channel_of(part) is not channel_of(COMM)
        assert any_rank(part, BAD)
    assert channel_of(COMM.Dup()) is channel_of(COMM)


# Models that differ


def run(build, **values):
    with Builder() as m:
        x = m.input("x", placement="partitioned")
        m.output(y=build(x))
    return m.compute("y", dict(x=np.ones(COMM.rank)) | values)


@several
@pytest.mark.parametrize(
    "build",
    [
        lambda x: mpi.allreduce(linalg.sum(x), COMM) * (2 + BAD),
        lambda x: mpi.allreduce(linalg.sum(x), COMM) + 1 if BAD else mpi.allreduce(linalg.sum(x), COMM),
        lambda x: mpi.halo(x, COMM, 1, bool(BAD)),
        lambda x: mpi.allreduce(linalg.sum(np.exp(x) if BAD else np.log(x)), COMM),
        lambda x: mpi.allreduce(linalg.sum(x, axis=0 if BAD else None), COMM),
        lambda x: mpi.allreduce(x.eval((lambda v: v.sum() * 1.5) if BAD else (lambda v: v.sum())), COMM),
    ],
)
def test_models_that_differ_are_refused_on_all_ranks(build):
    with pytest.raises(Disagreement, match="different models.* built at .*test_together.py") as found:
        run(build)
    assert f"rank {LAST}" in str(found.value)
    assert any_rank(COMM, BAD)  # and all goes on


def test_what_each_rank_has_for_itself():
    """The parts of ranks may differ in numbers, lengths, rows and neighbours."""
    n = COMM.rank
    assert run(lambda x: mpi.allreduce(linalg.sum(x * float(n)), COMM)) == sum(
        i * i for i in range(COMM.size)
    )
    assert run(lambda x: mpi.allreduce(linalg.sum(x * np.ones(n)), COMM)) == sum(range(COMM.size))
    run(lambda x: mpi.allreduce(linalg.sum(x[: n // 2]), COMM))
    run(lambda x: mpi.alltoall(x, COMM, [n] + [0] * LAST))
    run(lambda x: mpi.shift(x, COMM))


@several
def test_operators_are_watched_if_that_is_asked_for():
    """A rank that leaves a model by an error which it catches is found by the others inside of it."""

    def look(x):
        if BAD:
            raise ArithmeticError
        return x

    with watched(timeout=30), Builder() as m:
        m.output(y=mpi.allreduce(m.input("x").eval(look), COMM))
        try:
            m.compute("y", dict(x=1.0))
        except ArithmeticError:
            assert BAD
            with pytest.raises(Disagreement):
                any_rank(COMM, False)
        except Disagreement as error:
            assert "in allreduce-1, built at" in str(error) and not BAD


def test_values_in_words():
    def closure(radius):
        return lambda k: k * radius

    assert describe_value(closure(2.0)) == describe_value(closure(2.0)) != describe_value(closure(3.0))
    assert describe_value(np.ones((3, 2))) == describe_value(np.zeros((5, 4))) != describe_value(np.ones(3))
    assert describe_value(slice(1, 2)) != describe_value(slice(1, 3))
    assert describe_value(slice(1, 2), whole=False) == describe_value(slice(1, 3), whole=False)
    assert describe_value((3, 4), whole=False) == describe_value((5, 6), whole=False)
    assert describe_value(2.0, exact=False) == describe_value(3, exact=False) == "a number"
    assert describe_value([1.0, {"a": 2}]) == "[1.0, {'a': 2}]"
    assert COMM.size == len(COMM.allgather(0))


def scaled_sum():
    """The sum over all ranks of their parts `x`, times that of `a`, which is the same on all."""
    with Builder() as m:
        a, x = m.input("a", placement="replicated"), m.input("x", placement="partitioned")
        m.output(y=mpi.allreduce(linalg.sum(x), COMM) * linalg.sum(a * 1.0))
    return m


@several
@pytest.mark.parametrize(
    "good, bad",
    [
        (2.0, 3.0),
        (2, 1),
        (np.float32(1), np.float32(1.01)),
        (1 + 2j, 1 + 1j),
        (np.arange(3.0), np.arange(3.0)[::-1].copy()),
        (np.arange(3.0), np.arange(4.0)),
        (np.arange(3.0), np.array([0, 1, np.nan])),
        (np.arange(12), np.arange(12) + (np.arange(12) == 5)),
    ],
    ids=str,
)
def test_an_input_declared_replicated_is_the_same_on_all_ranks(good, bad):
    m, x, gradient = scaled_sum(), np.ones(COMM.rank), dict(_y=1.0)
    m.compute_with_vjp(dict(a=good, x=x), gradient)
    with pytest.raises(Disagreement, match=rf"input 'a'.*is another.*rank {LAST}: "):
        m.compute_with_vjp(dict(a=bad if BAD else good, x=x), gradient)
    if np.asarray(good).dtype.kind in "fc":
        rounded = good * (1 + 1e-12 * COMM.rank)
        m.compute_with_vjp(dict(a=rounded, x=x), gradient)
    m.compute_with_vjp(dict(a=good, x=x), gradient)  # they still meet


@several
def test_the_place_is_told_where_more_than_rounding_differs():
    a = np.array([1 + 1e-12 * COMM.rank, np.nan, 7.0 + BAD])
    with pytest.raises(Disagreement, match=rf": 7\.0; rank {LAST}: 8\.0; "):
        scaled_sum().compute("y", dict(a=a, x=np.ones(COMM.rank)))


@several
def test_of_a_long_input_a_sample_is_looked_at_or_all():
    m, x, good = scaled_sum(), np.ones(COMM.rank), np.zeros(20_000)
    odd, all_over = good.copy(), good + BAD
    odd[1] = BAD
    with watched(False, 30):
        m.compute("y", dict(a=odd, x=x))
        with pytest.raises(Disagreement, match="input 'a'"):
            m.compute("y", dict(a=all_over, x=x))
    with watched(True, 30), pytest.raises(Disagreement, match="input 'a'"):
        m.compute("y", dict(a=odd, x=x))
