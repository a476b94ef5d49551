"""The tests of derivatives on any number of ranks, with an operator that communicates; and a walk over all operators of the package."""

import importlib
import pkgutil
import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pmesh")

from mpi4py import MPI  # noqa: E402

import vmad_lit  # noqa: E402
from vmad_lit import Builder, autooperator, operator  # noqa: E402
from vmad_lit.core.autooperator import AutoOperator  # noqa: E402
from vmad_lit.core.operator import Operator, ZeroGradient  # noqa: E402
from vmad_lit.lib import linalg, mpi  # noqa: E402
from vmad_lit.testing import check, check_second_order, squared_norm  # noqa: E402

COMM = MPI.COMM_WORLD

# A partitioned operator of our own: uneven parts, the first of which is empty


def total(x, comm):
    return comm.allreduce(0.0 if x is ZeroGradient else np.sum(x))


class Fractions:
    """The elements of a partitioned array as fractions of their sum over all ranks."""

    ain, aout = "x", "y"
    collective = True

    def apl(node, x, comm):
        return dict(y=x / total(x, comm))

    def jvp(node, x_, x, comm, y):
        return dict(y_=(x_ - y * total(x_, comm)) / total(x, comm))

    def vjp(node, _y, x, comm, y):
        return dict(_x=(_y - total(_y * y, comm)) / total(x, comm))

    def hvp(node, _y, x_, x, comm, y):
        s, s_ = total(x, comm), total(x_, comm)
        y_, _x = (x_ - y * s_) / s, (_y - total(_y * y, comm)) / s
        return dict(_x_=-(total(_y * y_, comm) + _x * s_) / s)


fractions = operator(Fractions)


def weights(dtype="f8"):
    n = 4 if COMM.size == 1 else 2 * COMM.rank
    return np.random.default_rng(COMM.rank).uniform(0.5, 1.5, n).astype(dtype)


@pytest.mark.collective
@pytest.mark.parametrize("dtype", ["f8", "f4"])
def test_a_distributed_operator(dtype):
    report = check(fractions, weights(dtype), COMM, comm=COMM)
    assert report.second is not None
    assert len(set(COMM.allgather(tuple(report.rates)))) == 1  # all ranks have seen the same


@pytest.mark.collective
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_an_infinity_on_one_rank_is_told_by_all():
    x = np.linspace(1.0, 2.0, 4) * [COMM.rank + 1 < COMM.size, 1, 1, 1]  # a zero on the last rank only
    with pytest.raises(AssertionError, match="the value of 'y' is not finite at this point") as caught:
        check(linalg.log, x, comm=COMM)
    known = COMM.allgather("first after log-0" in str(caught.value))
    assert known == [rank + 1 == COMM.size for rank in range(COMM.size)]


@pytest.mark.collective
def test_a_model_around_a_distributed_operator():
    @autooperator("x, b -> y")
    def entropy(x, b, comm):
        p = fractions(x ** mpi.allbcast(b, comm), comm)
        return mpi.allreduce(-linalg.sum(p * linalg.log(p)), comm)

    assert check(entropy, weights(), 1.3, COMM, comm=COMM).second[-1] > 1.9
    assert check_second_order(lambda x, b: entropy(x, b, COMM), weights(), 1.3, comm=COMM)[-1] > 1.9


@pytest.mark.collective
@pytest.mark.parametrize("wrong", ["jvp", "vjp", "hvp"])
def test_a_wrong_derivative_is_found_on_all_ranks(wrong):
    """Each rank uses the sum of its own part, which is right on one rank; so there it is wrong by a percent instead."""
    cls = type("wrong_fractions", (Fractions,), {})
    right = getattr(Fractions, wrong)

    def derivative(node, *args):
        ((name, value),) = right(node, *args).items()
        return {name: value * 1.01 if COMM.size == 1 else value + 0.01 * COMM.rank * np.ones_like(value)}

    source = {"jvp": lambda node, x_, x, comm, y: derivative(node, x_, x, comm, y),
              "vjp": lambda node, _y, x, comm, y: derivative(node, _y, x, comm, y),
              "hvp": lambda node, _y, x_, x, comm, y: derivative(node, _y, x_, x, comm, y)}[wrong]  # fmt: skip
    setattr(cls, wrong, source)
    with pytest.raises(
        AssertionError,
        match="wrong_fractions: the jvp"
        if wrong == "jvp"
        else "wrong_fractions: jvp and vjp"
        if wrong == "vjp"
        else "wrong_fractions: the hvp",
    ):
        check(operator(cls), weights(), COMM, comm=COMM)


def test_the_squared_norm_of_test_classes():
    x = np.array([1.0, -2.0 + 1j])
    assert check(squared_norm, x, truth=6.0).second is not None


# All operators of the package

PROVED_IN = {
    **{
        f"vmad_lit.{name}": "test_operators.py"
        for name in ("core.stdlib.operators", "core.stdlib.utils", "lib.unary", "lib.binary", "lib.linalg")
    },
    "vmad_lit.lib.binary": "test_operators.py test_numpy_calls.py",
    "vmad_lit.lib.mpi": "test_mpi.py test_placement.py",
    **{
        f"vmad_lit.lib.{name}": "test_mesh.py"
        for name in ("mesh", "transfer", "exchange", "painting", "force", "lpt")
    },
    **{
        f"vmad_lit.lib.{name}": "test_cosmology_nbody.py test_nbody.py test_checkpoint.py"
        for name in ("axpy", "nbody")
    },
    "vmad_lit.lib.cosmology": "test_cosmology.py test_cosmology_nbody.py",
    "vmad_lit.lib.spectra": "test_spectra.py",
    "vmad_lit.testing": "test_trust.py",
    "vmad_lit.lib.tracers": "test_spectra.py",
}
UNDER_ANOTHER_NAME = {  # of overloaded operators, and parts that are proved with what they are a part of
    "squared_norm_of_field": "linalg.to_scalar", "norm_of_field": "linalg.norm", "copy_of_field": "linalg.copy", "sum_of_field": "linalg.sum",
    "mean_of_field": "linalg.mean", "inner_product_of_fields": "linalg.dot", "in_precision": "lpt", "local_squares": "chisquare",
    "accumulate": "accumulate", "items": "ListPlaceholder",
}  # fmt: skip


def operators():
    """All operators that the package declares by hand; the derivatives of autooperators follow from those."""
    for info in pkgutil.walk_packages(vmad_lit.__path__, "vmad_lit."):
        if not info.name.endswith("__main__"):
            for op in vars(importlib.import_module(info.name)).values():
                if isinstance(op, Operator) and type(op) is not AutoOperator and op.__module__ == info.name:
                    yield op


def names_it(text, op):
    name = UNDER_ANOTHER_NAME.get(op.__name__, op.__name__)
    return re.search(rf"\b{re.escape(name)}\b", text)


def without_proof():
    every = {path.name: path.read_text() for path in Path(__file__).parent.glob("test_*.py")}
    for op in operators():
        files = PROVED_IN.get(op.__module__, " ".join(every)).split()
        if op.__name__ in UNDER_ANOTHER_NAME:
            files = [name for name in every if name != "test_trust.py"]
        if not any(names_it(every[name], op) for name in files):
            yield f"{op.__module__}.{op.__name__}"


def test_every_operator_of_the_package_is_in_a_register():
    assert list(without_proof()) == []


def test_an_operator_that_is_in_no_register_is_found(monkeypatch):
    class newcomer(Fractions):
        __module__ = "vmad_lit.lib.spectra"

    monkeypatch.setattr("vmad_lit.lib.spectra.newcomer", operator(newcomer), raising=False)
    assert list(without_proof()) == ["vmad_lit.lib.spectra.newcomer"]
