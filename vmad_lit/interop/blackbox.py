"""Functions of which nothing is known but their values, as operators: derivatives by finite differences."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from vmad_lit.core.arguments import one_of, real_number
from vmad_lit.core.operator import Operator
from vmad_lit.core.placement import Placement, Site
from vmad_lit.core.stdlib.operators import Array
from vmad_lit.core.together import raise_together
from vmad_lit.core.traffic import count_object
from vmad_lit.interop.foreign import (
    Arrays,
    Foreign,
    MaybeArrays,
    Others,
    by_name,
    name_of,
    operator_of,
    read_signature,
)


class NotSmooth(UserWarning):
    """Two steps of finite differences tell different slopes."""


def reals(arrays: Iterable[Array]) -> Array:
    """The numbers of some arrays in one, in double precision; a complex number is two."""
    flat = [a.astype("c16" if a.dtype.kind == "c" else "f8").ravel().view("f8") for a in arrays]
    return np.concatenate([np.zeros(0), *flat])


def in_form(flat: Array, forms: Iterable[Array]) -> Arrays:
    """The inverse of `reals`: arrays of the shapes and types of others."""
    arrays, begin = [], 0
    for form in forms:
        end = begin + form.size * (2 if form.dtype.kind == "c" else 1)
        array = flat[begin:end].view("c16" if form.dtype.kind == "c" else "f8")
        arrays.append(array.astype(form.dtype).reshape(form.shape))
        begin = end
    return arrays


def spacings(arrays: Iterable[Array]) -> Array:
    """For each of the numbers of `reals` the distance to the next one of its type."""
    flat = [np.spacing(abs(a.ravel().view(a.real.dtype))).astype("f8") for a in arrays]
    return np.concatenate([np.zeros(0), *flat])


def filled(derivatives: MaybeArrays, like: Arrays) -> Arrays:
    """Derivatives with zeros in the place of None, of the types of their values."""
    return [np.zeros_like(a) if d is None else d.astype(a.dtype) for d, a in zip(derivatives, like)]


class Differences(Foreign):
    """A function and its Jacobian matrix by finite differences. That of the latest point is kept."""

    def __init__(
        self,
        f: Callable[..., Any],
        ain: Sequence[str],
        aout: Sequence[str],
        order: int = 4,
        accuracy: float | None = None,
        scale: float | None = None,
        comm: Any = None,
    ) -> None:
        super().__init__()
        self.f, self.ain, self.aout = by_name(f), ain, aout
        self.name, self.__doc__ = name_of(f), f.__doc__
        self.order, self.accuracy, self.scale, self.comm = order, accuracy, scale, comm
        self.calls = 0
        self.latest: Any = None

    def pull(self, x: Arrays, others: Others, cotangents: MaybeArrays) -> Arrays:
        """The Jacobian times cotangents."""
        y, rows = self.jacobian(x, others)
        return in_form(rows @ reals(filled(cotangents, y)), x)

    def push(self, x: Arrays, others: Others, tangents: MaybeArrays) -> Arrays:
        """Tangents times the Jacobian."""
        y, rows = self.jacobian(x, others)
        return in_form(reals(filled(tangents, x)) @ rows, y)

    def jacobian(self, x: Arrays, others: Others) -> tuple[Arrays, Array]:
        """The results, and the derivatives of all of them with respect to each real number of x, as rows."""
        key = [(a.shape, a.dtype, a.tobytes()) for a in x], repr(others)
        if self.latest is None or self.latest[0] != key:
            self.latest = key, self.measure(x, others)
        return self.latest[1]

    def value(self, x: Arrays, others: Others) -> Arrays:
        """The results, as arrays."""
        self.calls += 1
        y = self.f(**{name: a.copy()[()] for name, a in zip(self.ain, x)}, **others)
        several = y if isinstance(y, (tuple, list)) and len(self.aout) > 1 else [y]
        arrays = [np.asarray(part) for part in several]
        if len(arrays) != len(self.aout) or not {array.dtype.kind for array in arrays} <= set("iufc"):
            found = ", ".join(f"{a.dtype}{list(a.shape)}" for a in arrays)
            raise TypeError(
                f"{self.name} has to return numbers for {', '.join(self.aout)}, and returned {found}"
            )
        return [array if array.dtype.kind in "fc" else array.astype(float) for array in arrays]

    def measure(self, x: Arrays, others: Others) -> tuple[Arrays, Array]:
        """What `jacobian` returns, computed."""
        y, again = self.value(x, others), reals(self.value(x, others))
        accuracy = self.accuracy or max(float(np.finfo(a.dtype).eps) for a in (*x, *y))
        differ = float(np.max(abs(again - reals(y)), initial=0.0))
        n, comm = reals(x).size, self.comm
        rows, doubts, error = np.zeros((n, again.size)), np.zeros(n), None
        # Measure the rows of this rank
        try:
            if differ > 10 * accuracy * np.max(abs(again), initial=0.0):
                raise ValueError(
                    f"{self.name} returns other results for the same arguments, by {differ:.1e}; if that is all that "
                    "can be had, give its relative size as accuracy="
                )
            for i in range(n) if comm is None else range(comm.rank, n, comm.size):
                rows[i], doubts[i] = self.slope(x, others, i, accuracy)
        except Exception as e:
            error = e
        # Put the rows of all ranks together
        raise_together(comm, error)
        if comm is not None and comm.size > 1:
            count_object(comm, (rows, doubts))
            rows, doubts = (np.sum(parts, axis=0) for parts in zip(*comm.allgather((rows, doubts))))
        self.tell(doubts)
        return y, rows

    def slope(self, x: Arrays, others: Others, i: int, accuracy: float) -> tuple[Array, float]:
        """The derivatives with respect to number i, and by how much two steps differ about them, relatively."""
        flat = reals(x)
        h = (self.scale or abs(flat[i]) or 1.0) * accuracy ** (1 / (self.order + 1))
        # Refuse steps that are lost in rounding
        smallest, gap = h if self.order == 2 else h / 2, spacings(x)[i]
        if smallest < 2 * gap:
            raise ValueError(
                f"the step of {smallest:.1e} for number {i} of the arguments of {self.name} is lost in rounding: beside "
                f"{flat[i]:.6g}, the numbers of its type are {gap:.1e} apart; give a larger scale=, or more precise arguments"
            )

        # Take a central difference
        def difference(h: float) -> tuple[Array, Any]:
            ends = []
            for moved in flat[i] + h, flat[i] - h:
                there = flat.copy()
                there[i] = moved
                arrays = in_form(there, x)
                ends.append((reals(self.value(arrays, others)), reals(arrays)[i]))
            (up, right), (down, left) = ends
            return (up - down) / (right - left), abs(up).max(initial=0.0)

        wide, largest = difference(h)
        if self.order == 2:
            return wide, 0.0
        narrow, _ = difference(h / 2)
        noise = 10 * accuracy * largest / h
        doubt = np.max(abs(narrow - wide), initial=0.0) / (np.max(abs(narrow), initial=0.0) + noise or 1.0)
        return (4 * narrow - wide) / 3, doubt

    def tell(self, doubts: Array) -> None:
        """Warn if the differences are not to be trusted."""
        worst = int(np.argmax(doubts)) if doubts.size else 0
        if doubts.size and doubts[worst] > 0.01:
            warnings.warn(
                f"the derivative of {self.name} with respect to number {worst} of its arguments differs by "
                f"{100 * doubts[worst]:.2g} % between two steps: a kink or a jump is near, or its results are noisy "
                "(then give accuracy=), or the steps are of a wrong size (then give scale=)",
                NotSmooth,
                stacklevel=2,
            )

    def where(self, site: Site) -> Placement | None:
        """On all ranks the same."""
        for name, place in site.given.items():
            if isinstance(place, Placement) and place.kind == "partitioned":
                site.refuse(
                    f"'{name}' is spread over ranks, and {self.name} is differentiated number by number"
                )
        return super().where(site)


def black_box(
    f: Callable[..., Any],
    signature: str | None = None,
    order: int = 4,
    accuracy: float | None = None,
    scale: float | None = None,
    comm: Any = None,
    collective: bool = False,
) -> Operator:
    """An operator of any function of numbers and arrays; its derivatives are finite differences.

    Parameters
    ----------
    f : function of numbers or NumPy arrays that returns one, or a tuple of them, and depends on nothing else.
    signature : names of the arguments that have derivatives, and of the results, ``"x, y -> z"``. What is left of the
        parameters of f are hyper-parameters. By default all parameters without a default, and ``y``.
    order : 4 for four calls of f for each real number among the arguments (Richardson's extrapolation, which also
        notices what is not smooth), 2 for two (central differences).
    accuracy : the relative error of what f returns; by default that of its type. Steps follow from it.
    scale : the size of the arguments, of which a step is a fraction; by default that of each number itself.
    comm : communicator over whose ranks the calls are dealt out, for an f that does not communicate.
    collective : whether f itself talks to other ranks, so that all have to call it together.

    Returns
    -------
    Operator
        Arguments and results are replicated. There are no second derivatives. Derivatives raise ValueError if f
        returns something else for the same arguments, or a step is smaller than the spacing of numbers of its type,
        and warn :class:`NotSmooth`.
    """
    # Check the options of a black box
    one_of("order", order, (2, 4))
    for name, value in ("accuracy", accuracy), ("scale", scale):
        if value is not None:
            real_number(name, value, above=0)
    if comm is not None and collective:
        raise ValueError(
            "the calls of a function that is collective cannot be dealt out over the ranks of comm"
        )
    ain, aout, hyper = read_signature(f, signature)
    differences = Differences(f, ain, aout, order, accuracy, scale, comm)
    return operator_of(differences, hyper, second=False, collective=collective or comm is not None)
