"""Meetings of ranks, which notice that some are elsewhere, and look after those who do not come.

Environment
-----------
VMAD_LIT_CHECK : with 1, each collective operator begins with a meeting
VMAD_LIT_TIMEOUT : seconds after which a rank that waits for others gives up; by default 60 with VMAD_LIT_CHECK=1,
    and never without
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NoReturn
from zlib import crc32

import numpy

from .error import Disagreement, LeftAlone
from .together import HOW, ask
from .traffic import count_object, count_to_all

Detail = tuple[str, str]  # what is described, and its description
OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


class Watch:
    """How closely ranks look after each other.

    Attributes
    ----------
    check : bool
        Whether each collective operator begins with a meeting; models look at it when they are run for the first time.
    timeout : float or None
        Seconds that a rank waits for others before it raises LeftAlone.
    patience : float
        Seconds after which a rank that waits without end says so.
    """

    check = os.environ.get("VMAD_LIT_CHECK", "0") not in ("", "0")
    timeout: float | None = float(os.environ.get("VMAD_LIT_TIMEOUT") or 0) or (60.0 if check else None)
    patience = 60.0


@contextmanager
def watched(check: bool = True, timeout: float | None = 60.0) -> Iterator[None]:
    """In this context ranks look after each other more closely, or less; see `Watch`."""
    before = Watch.check, Watch.timeout
    Watch.check, Watch.timeout = check, timeout
    try:
        yield
    finally:
        Watch.check, Watch.timeout = before


class Place:
    """Where a rank is, for meetings.

    Parameters
    ----------
    key : int
        Stands for the place: not negative, and the same on all ranks that are at the same one.
    what : str or callable
        The place in words, or a function that finds them when they are needed.
    details : callable, optional
        What the rank does there, piece by piece, to be compared if the keys differ.
    values : mapping
        Numbers and arrays by name that are meant to be the same on all ranks, to rounding.
    """

    def __init__(
        self,
        key: int,
        what: str | Callable[[], str],
        details: Callable[[], list[Detail]] | None = None,
        values: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.key, self.what, self.details, self.values = key, what, details, values

    def __str__(self) -> str:
        what = self.what if isinstance(self.what, str) else self.what()
        function, line = find_caller()
        return f"{what} ({function}, called at {line})" if line else what


def take_samples(values: Mapping[str, Any]) -> dict[str, Any]:
    """What is looked at of values that are meant to be the same: a thousand numbers of a long array, or with
    `Watch.check` all."""
    arrays = {name: numpy.asarray(value) for name, value in values.items()}
    few = {name: 1 if Watch.check else 1 + array.size // SAMPLE for name, array in arrays.items()}
    return {name: array.reshape(-1)[:: few[name]] for name, array in arrays.items()}


SAMPLE = 1000


def digest_samples(samples: Mapping[str, Any]) -> int:
    """A number that changes with the samples."""
    digest = 0
    for name, sample in samples.items():
        digest = crc32(sample.tobytes(), crc32(f"{name} {sample.dtype} {sample.shape}".encode(), digest))
    return digest


def differ_by_more_than_rounding(a: Any, b: Any) -> Any:
    """Where two flat arrays of one length differ by more than another order of sums explains."""
    kinds = [array.dtype for array in (a, b) if array.dtype.kind in "fc"]
    eps = max((float(numpy.finfo(dtype).eps) for dtype in kinds), default=0.0)
    largest = numpy.abs(a[numpy.isfinite(a)]).max(initial=0)
    return ~numpy.isclose(a, b, rtol=0, atol=eps**0.5 * largest, equal_nan=True)


def find_caller() -> tuple[str, str]:
    """Which function of this package a program has called, and on which line; empty if that is not known."""
    frame: Any = sys._getframe(1)
    function = ""
    while frame is not None and frame.f_code.co_filename.startswith(OURS):
        function, frame = frame.f_code.co_qualname, frame.f_back
    return function, "" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


class Channel:
    """A communicator on which some ranks meet, and nothing else is sent.

    Parameters
    ----------
    comm : MPI communicator
        One of the same ranks.
    """

    def __init__(self, comm: Any) -> None:
        self.mpi = sys.modules["mpi4py.MPI"]
        self.size, self.rank = comm.Get_size(), comm.Get_rank()
        self.private, self.making = comm.Idup()
        self.made, self.count, self.last = False, 0, ""
        self.broken: LeftAlone | None = None
        self.mine, self.largest = numpy.zeros(5, "i8"), numpy.zeros(5, "i8")
        self.heard: dict[int, tuple[int, str]] = {}
        self.sent: list[Any] = []

    def meet(self, flag: bool, place: Place, meanwhile: Callable[[float], None] | None = None) -> bool:
        """Whether a flag is up on any rank. Collective.

        While others do not come, `meanwhile` is called now and then with the seconds that have passed, and decides;
        without it they are waited for as `Watch` says.

        Raises
        ------
        Disagreement
            On all ranks: they are at different places, or have other values where they should have the same.
        LeftAlone
            Others did not come in time.
        """
        if self.broken is not None:
            raise LeftAlone(f"a meeting of the ranks has failed before: {self.broken}")
        self.count += 1
        try:
            # Learn the largest of what the ranks bring
            if not self.made:
                self.wait(self.making, place, meanwhile)
                self.made = True
            samples = take_samples(place.values) if place.values else {}
            digest = digest_samples(samples)
            self.mine[:] = flag, place.key, -place.key, digest, -digest
            count_to_all(self.private, self.mine.nbytes)
            request = self.private.Iallreduce(self.mine, self.largest, op=self.mpi.MAX)
            self.wait(request, place, meanwhile)
        except BaseException as error:
            self.broken = error if isinstance(error, LeftAlone) else LeftAlone(f"interrupted by {error!r}")
            raise
        if self.largest[1] != -self.largest[2]:
            self.differ(place)
        if self.largest[3] != -self.largest[4] and not self.largest[0]:
            self.compare(place, samples)
        self.last = place.what if isinstance(place.what, str) else ""
        return bool(self.largest[0])

    def wait(self, request: Any, place: Place, meanwhile: Callable[[float], None] | None) -> None:
        """Wait until a request is complete, and look after those for whom it waits."""
        if request.Test():
            return
        before, waited, told, meanwhile = time.monotonic(), 0.0, False, meanwhile or self.patience(place)
        while not request.Test():
            time.sleep(0 if waited < 1e-3 else min(waited / 50, 2e-3))
            now = time.monotonic()
            waited, before = waited + min(now - before, 0.1), now
            if waited > min(1.0, (Watch.timeout or 2.0) / 2) and self.made and not told:
                self.tell(place)
                told = True
            meanwhile(waited)

    def patience(self, place: Place) -> Callable[[float], None]:
        """What a rank does while others do not come."""
        limit = Watch.timeout
        warned: list[bool] = []

        def meanwhile(waited: float) -> None:
            if limit and waited > limit:
                raise LeftAlone(self.report(waited, place))
            if not limit and waited > Watch.patience and not warned:
                warned.append(True)
                print(
                    f"vmad_lit: {self.report(waited, place)}; it goes on waiting", file=sys.stderr, flush=True
                )

        return meanwhile

    def tell(self, place: Place) -> None:
        """Tell others where this rank waits."""
        few = {(self.rank + 2**k) % self.size for k in range(self.size.bit_length())} | {0}
        for other in range(self.size) if self.size <= 32 else sorted(few):
            if other != self.rank:
                note = self.count, str(place)
                count_object(self.private, note, to=other)
                self.sent.append(self.private.isend(note, dest=other, tag=1))

    def hear(self) -> None:
        """Listen to what others tell."""
        status = self.mpi.Status()
        while self.private.iprobe(tag=1, status=status):
            self.heard[status.Get_source()] = self.private.recv(source=status.Get_source(), tag=1)

    def report(self, waited: float, place: Place) -> str:
        """Where the ranks are, as far as this one knows."""
        if not self.made:
            missing = f"some of the {self.size} ranks, which have not met before, have not come"
        else:
            for _ in range(20):  # who began to wait at the same time will say so now
                self.hear()
                time.sleep(0.01)
            here = {rank for rank, (count, _) in self.heard.items() if count == self.count} | {self.rank}
            away = [rank for rank in range(self.size) if rank not in here]
            missing = f"{name_ranks(away)} did not come" + (f", last seen {self.last}" if self.last else "")
        return f"rank {self.rank} has waited for {waited:.3g} s {place}; {missing}"

    def compare(self, place: Place, samples: Mapping[str, Any]) -> None:
        """Raise an error on all ranks if values differ that are meant to be the same. Collective."""
        count_object(self.private, samples)
        everybody = self.private.allgather(samples)
        for name in samples:
            told = tell_apart([theirs[name] for theirs in everybody])
            if told:
                raise Disagreement(
                    f"{name} is declared to be the same on all ranks, but is another: {told}; {place}"
                )

    def differ(self, place: Place) -> NoReturn:
        """Raise an error on all ranks that tells where they are, or what they disagree about. Collective."""
        details = [] if place.details is None else place.details()
        digests = [crc32(text.encode()) for _, text in details]
        mine = str(place), digests
        count_object(self.private, mine)
        everybody = self.private.allgather(mine)
        if all(theirs for _, theirs in everybody):
            # Look for the first detail in which ranks differ
            same = 0
            while len({theirs[same] if same < len(theirs) else -1 for _, theirs in everybody}) == 1:
                same += 1
            label, text = details[same] if same < len(details) else ("the end of the model", "nothing more")
            count_object(self.private, (label, text))
            told = self.private.allgather((label, text))
            kinds = in_words(f"{text} ({label})" if label != told[0][0] else text for label, text in told)
            raise Disagreement(f"ranks have built or run different models; {told[0][0]}: {kinds}; {place}")
        raise Disagreement(f"ranks are at different places: {in_words(where for where, _ in everybody)}")


def tell_apart(arrays: list[Any]) -> str:
    """What ranks have in the first place where they differ by more than rounding; nothing if there is none."""
    if len({array.shape for array in arrays}) > 1:
        return in_words(f"{array.size} numbers" for array in arrays)
    apart: Any = [differ_by_more_than_rounding(arrays[0], array) for array in arrays]
    places = numpy.flatnonzero(numpy.any(apart, axis=0))
    return in_words(str(array[places[0]]) for array in arrays) if len(places) else ""


def in_words(texts: Any) -> str:
    """What ranks have, those together that have the same."""
    groups: dict[str, list[int]] = {}
    for rank, text in enumerate(texts):
        groups.setdefault(text, []).append(rank)
    return "; ".join(f"{name_ranks(ranks)}: {text}" for text, ranks in list(groups.items())[:4])


def name_ranks(ranks: list[int]) -> str:
    """Some ranks by name."""
    names = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' * (len(ranks) != 1)} {names}"


CHANNELS: dict[str, Channel] = {}  # that of all ranks
KEYS: list[int] = []  # that of the attribute with the channel of a smaller communicator


def channel_of(comm: Any) -> Channel | None:
    """The channel of the ranks of a communicator; None if they need none, or the communicator is not one of MPI."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is None or not isinstance(comm, mpi.Intracomm) or comm.Get_size() == 1:
        return None
    if comm.Get_size() == mpi.COMM_WORLD.Get_size():
        return channel_of_all(mpi)
    if not KEYS:
        KEYS.append(mpi.Comm.Create_keyval())
    channel: Channel | None = comm.Get_attr(KEYS[0])
    if channel is None:
        channel = Channel(comm)
        comm.Set_attr(KEYS[0], channel)
    return channel


def channel_of_all(mpi: Any) -> Channel:
    if "all" not in CHANNELS:
        CHANNELS["all"] = Channel(mpi.COMM_WORLD)
    return CHANNELS["all"]


TOGETHER = Place(crc32(b"together"), "in a call that fails on all ranks or on none")


def any_rank(comm: Any, flag: bool) -> bool:
    """Whether a flag is up on any rank. Collective: a meeting."""
    channel = channel_of(comm)
    return ask(comm, flag) if channel is None else channel.meet(flag, TOGETHER)


HOW["any_rank"] = any_rank
