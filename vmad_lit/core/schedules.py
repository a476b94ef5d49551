"""Schedules: which states of a chain are kept, and when they are used."""

import contextlib
import inspect
import io
from collections.abc import Callable
from functools import partial
from numbers import Integral
from typing import Any

from .error import BadArgument, did_you_mean, needed_for


class Actions:
    """The actions of a schedule.

    Attributes
    ----------
    forward : list
        What to do in the forward run.
    reverse : list or None
        What to do in the reverse sweep, if the schedule provides for one.
    repeatable : bool
        Whether the reverse sweep leaves behind all that was kept at the end of the forward run.
    """

    def __init__(self, schedule: Any, n: int) -> None:
        self.repeatable = schedule.max_n is None
        self.forward: list[Any] = []
        self.reverse: list[Any] | None = None
        actions = self.forward
        for action in schedule:
            # Take down an action
            kind = type(action).__name__
            if kind == "EndForward":
                actions = []
            elif kind == "EndReverse":
                self.reverse = actions
                break
            else:
                actions.append(action)
            if schedule.max_n is None and getattr(action, "n1", 0) >= n:
                schedule.finalize(n)


def library() -> Any:
    with needed_for("checkpoints", extra="checkpoint"):
        import checkpoint_schedules
    # Keep the library from compiling what is run in no time
    multistage = checkpoint_schedules.multistage
    multistage.n_advance = getattr(multistage.n_advance, "py_func", multistage.n_advance)
    return checkpoint_schedules


def multistage(n: int, ram: int | None = None, disk: int = 0) -> Any:
    ram = n if ram is None else ram
    if ram + disk < 1:
        raise BadArgument("at least one state must be kept, in memory or on disk; got ram = 0 and disk = 0")
    return library().MultistageCheckpointSchedule(n, min(ram, n), min(disk, n))


def revolve(n: int, ram: int) -> Any:
    return multistage(n, at_least_one(ram=ram))


def at_least_one(**number: int) -> int:
    ((name, value),) = number.items()
    if value < 1:
        raise BadArgument(f"{name} must be at least one for this schedule, got {value}")
    return value


def two_level(n: int, period: int, ram: int | None = None) -> Any:
    ram = at_least_one(period=period) if ram is None else ram
    storage = library().StorageType.RAM
    return library().TwoLevelCheckpointSchedule(period, ram, binomial_storage=storage)


def all_on_disk(n: int) -> Any:
    return library().SingleDiskStorageSchedule()


def disk_revolve(n: int, ram: int, costs: dict[str, float] | None = None) -> Any:
    return library().DiskRevolve(n, at_least_one(ram=ram), **of_library(costs))


def periodic_disk_revolve(n: int, ram: int, costs: dict[str, float] | None = None) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        return library().PeriodicDiskRevolve(n, at_least_one(ram=ram), **of_library(costs))


def h_revolve(n: int, ram: int, disk: int, costs: dict[str, float] | None = None) -> Any:
    costs, ram = of_library(costs), at_least_one(ram=ram)
    return library().HRevolve(n, ram, disk, **costs) if n > 1 else multistage(n, ram)


def of_library(costs: dict[str, float] | None) -> dict[str, float]:
    """Costs by the names that they have in the library."""
    known = dict(forward="uf", reverse="ub", write="wd", read="rd")
    for name in costs or {}:
        if name not in known:
            raise BadArgument(f"there is no cost '{name}'" + did_you_mean(name, list(known)))
    return {known[name]: value for name, value in (costs or {}).items()}


def mixed(n: int, ram: int = 0, disk: int = 0) -> Any:
    if (ram < 1) == (disk < 1):
        raise BadArgument(f"a mixed schedule is all in memory or all on disk; got ram = {ram}, disk = {disk}")
    storage = library().StorageType.RAM if ram else library().StorageType.DISK
    return library().MixedCheckpointSchedule(n, ram or disk, storage=storage)


def all_tapes(n: int) -> Any:
    return library().SingleMemoryStorageSchedule()


def nothing(n: int) -> Any:
    return library().NoneCheckpointSchedule()


SCHEDULES: dict[str, Callable[..., Any]] = {
    "multistage": multistage,
    "revolve": revolve,
    "two-level": two_level,
    "disk": all_on_disk,
    "disk-revolve": disk_revolve,
    "periodic-disk-revolve": periodic_disk_revolve,
    "h-revolve": h_revolve,
    "mixed": mixed,
    "tapes": all_tapes,
    "none": nothing,
}


def find_schedule(schedule: str | Callable[[int], Any], numbers: dict[str, Any]) -> Callable[[int], Any]:
    """The function from `n` to a schedule, for a name and the numbers that go with it."""
    given = {name: value for name, value in numbers.items() if value is not None}
    if callable(schedule):
        if given:
            raise BadArgument(f"a schedule of your own has its own numbers, got {', '.join(given)} too")
        return schedule
    if schedule not in SCHEDULES:
        raise BadArgument(f"there is no schedule '{schedule}'" + did_you_mean(schedule, list(SCHEDULES)))
    make = SCHEDULES[schedule]
    # Compare the numbers with those that it takes
    _, *parameters = inspect.signature(make).parameters.values()
    for p in parameters:
        if p.default is p.empty and p.name not in given:
            raise BadArgument(f"the schedule '{schedule}' needs {p.name}")
    for name, value in given.items():
        if name not in [p.name for p in parameters]:
            takes = ", ".join(p.name for p in parameters) or "no numbers"
            raise BadArgument(f"the schedule '{schedule}' has no use for {name}; it takes {takes}")
        if name != "costs" and not (is_whole(value) and value >= 0):
            what = "steps" if name == "period" else "states"
            raise BadArgument(f"{name} is a number of {what}, got {value!r}")
    make(2, **given)
    return partial(make, **given)


def is_whole(number: Any) -> bool:
    return isinstance(number, Integral)
