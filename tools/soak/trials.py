"""The kinds of misfortune, and what is made of them."""

from __future__ import annotations

import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from . import HUNG, LOST, REFUSED, RIGHT, UNCLEAR, WRONG
from .running import Ended, Job, python, run

#: The reconstruction that is disturbed, and when it saves its state.
JOB = (
    "-m vmad_lit.demo --nmesh 16 --steps 1 --maxiter 30 --save fields --output picture.png --state state.npz"
)
EVERY = 10
#: The same one with something else, which no state of the first one may serve.
OTHERS = (
    "--seed 7",
    "--noise 0.7",
    "--boxsize 80",
    "--steps 2",
    "--steps 0",
    "--steps -1",
    "--smoothing 4",
    "--nmesh 18",
    "--nmesh 12",
)
RESULTS = ("white_noise.npy", "final.npy")
#: How the demonstration says that it will not do something.
CLEAR = re.compile(r"^(\S+: )?error: .{10}", re.MULTILINE | re.IGNORECASE)
FULL = re.compile(r"No space left|File too large")


@dataclass
class Trial:
    """One misfortune: which, on how many ranks, and the seed of its dice."""

    kind: str
    ranks: int
    seed: str
    folder: Path
    limit: float
    whole: Whole
    said: list[str] = field(default_factory=list)
    disturbed: int = 0

    def __post_init__(self) -> None:
        self.dice = random.Random(self.seed)

    def run(
        self, arguments: str = JOB, ranks: int | None = None, disturb: Callable[[Job], bool] | None = None
    ) -> Ended:
        """Run a program in the folder of this trial."""
        command = python(*arguments.split())
        ended = run(command, self.folder, ranks or self.ranks, self.limit, disturb)
        self.say(f"$ {arguments}", ended)
        self.disturbed += ended.disturbed
        return ended

    def say(self, what: str, ended: Ended) -> None:
        """Remember the end of what a job has printed."""
        rows = [row.rpartition("\r")[2] for row in ended.text.split("\n")][-40:]
        self.said += [what, *filter(None, rows), f"[status {ended.status}, {ended.seconds:.1f} s]"]

    def compare(self, ranks: int | None = None, arguments: str = JOB) -> str:
        """Whether what has been found is what an undisturbed run finds: RIGHT or WRONG."""
        whole = self.whole(self.ranks, arguments)
        for name in RESULTS:
            path = self.folder / "fields" / name
            if not path.exists():
                return WRONG
            found, expected = np.load(path), np.load(whole.folder / "fields" / name)
            alike = found.shape == expected.shape and found.dtype == expected.dtype
            if ranks in (None, self.ranks):
                alike = alike and np.array_equal(found, expected)
            else:
                alike = alike and np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)
            if not alike:
                return WRONG
        return RIGHT


@dataclass
class Known:
    """What nobody has disturbed: where it is, how long it took, and what was printed."""

    folder: Path
    ended: Ended


class Whole:
    """Undisturbed runs, each made once, when it is asked for; and states that were left by a job that was killed."""

    def __init__(self, folder: Path, limit: float) -> None:
        self.folder, self.limit = folder, limit
        self.known: dict[tuple[Any, ...], Known] = {}
        self.locks: dict[tuple[Any, ...], threading.Lock] = {}
        self.lock = threading.Lock()

    def __call__(self, ranks: int, arguments: str | tuple[str, ...] = JOB) -> Known:
        """The undisturbed run of a program."""

        def make(folder: Path) -> Ended:
            words = arguments.split() if isinstance(arguments, str) else arguments
            ended = run(python(*words), folder, ranks, self.limit)
            if ended.status != 0:
                raise RuntimeError(f"an undisturbed run failed: {arguments} on {ranks}\n{ended.text}")
            return ended

        return self.once((ranks, arguments), make)

    def state(self, ranks: int, arguments: str = JOB) -> Path:
        """A folder with the state of a job that was killed some iterations after it had saved one."""

        def make(folder: Path) -> Ended:
            def kill(job: Job) -> bool:
                job.wait(self.limit, lambda: not job.running or iterations(job.text) > EVERY + 1, 0.02)
                return job.send(signal.SIGKILL, "job", random.Random())

            return run(python(*arguments.split()), folder, ranks, self.limit, kill)

        return self.once(("state", ranks, arguments), make).folder

    def once(self, key: tuple[Any, ...], make: Callable[[Path], Ended]) -> Known:
        with self.lock:
            lock = self.locks.setdefault(key, threading.Lock())
        with lock:
            if key not in self.known:
                folder = Path(tempfile.mkdtemp(dir=self.folder))
                self.known[key] = Known(folder, make(folder))
            return self.known[key]


# What became of it


def iterations(text: str) -> int:
    """How many iterations the bar of a minimisation has shown."""
    return max([int(count) for count in re.findall(r"(\d+)/30 \[", text)], default=0)


def went_on_from(text: str) -> int:
    """At which iteration a job has begun."""
    found = re.search(r"going on from iteration (\d+)", text)
    return int(found[1]) if found else 0


def refusal(ended: Ended, clear: re.Pattern[str] = CLEAR, tracebacks: bool = False) -> str:
    """What to say of a job that ended without an answer."""
    if ended.hung:
        return HUNG
    told = clear.search(ended.text) is not None and (tracebacks or "Traceback" not in ended.text)
    return REFUSED if told else UNCLEAR


# Killed, and told to end


def disturbed_again_and_again(trial: Trial, number: int, whom: str, keeps: int, other: bool = False) -> str:
    """A job gets a signal, up to three times, and is started again until it ends by itself.

    `keeps` is how many iterations may be lost each time. With `other`, the last run has another number of ranks.
    """
    took = trial.whole(trial.ranks).ended.seconds
    times, outcome, reached = trial.dice.randint(1, 3), RIGHT, 0

    def disturb(job: Job) -> bool:
        running = job.sleep(trial.dice.uniform(0.3, 1.05) * took)
        return running and job.send(number, whom, trial.dice)

    for _ in range(times):
        ended = trial.run(disturb=disturb)
        outcome = judge_end(ended, number, trial.ranks, outcome, reached - keeps)
        if ended.status == 0 or outcome == HUNG:
            return trial.compare() if ended.status == 0 and outcome == RIGHT else outcome
        reached = max(reached - keeps, 0, iterations(ended.text))
    ranks = trial.dice.choice([n for n in (1, 2, 3) if n != trial.ranks]) if other else trial.ranks
    ended = trial.run(ranks=ranks)
    if ended.status != 0:
        return refusal(ended) if other else HUNG if ended.hung else LOST
    outcome = LOST if went_on_from(ended.text) < reached - keeps else outcome
    answer = trial.compare(ranks)
    return answer if answer != RIGHT else outcome


def judge_end(ended: Ended, number: int, ranks: int, outcome: str, least: int) -> str:
    """The outcome after another signal: the job has gone on from an iteration, and may tell the signal by its status."""
    if ended.hung:
        return HUNG
    asked = number in (signal.SIGTERM, signal.SIGINT)
    begun = "going on" in ended.text or iterations(ended.text) > 0
    if "going on" in ended.text and went_on_from(ended.text) < least:
        return LOST
    told = 0, 128 + number, -number  # the last, if it came when all was done and the process about to end
    if asked and ranks == 1 and begun and ended.status not in told:
        return UNCLEAR
    return outcome


def killed(whom: str, other: bool = False) -> Callable[[Trial], str]:
    return partial(disturbed_again_and_again, number=signal.SIGKILL, whom=whom, keeps=EVERY, other=other)


def told_to_end(number: int, whom: str) -> Callable[[Trial], str]:
    return partial(disturbed_again_and_again, number=number, whom=whom, keeps=0)


# Full disks


def on_a_full_disk(trial: Trial) -> str:
    """A job goes on where there is not enough room; later there is. What there was before must still be there."""
    with small_disk(trial) as folder:
        copy_state(trial.whole.state(trial.ranks), folder)
        room = trial.dice.randint(0, 700_000)
        resize(folder, room)
        ended = trial.run()
        first = judge_full(ended)
        if first not in (RIGHT, REFUSED):
            return first
        resize(folder, 2**26)
        return resume(trial, ended, first)


def beyond_a_limit(trial: Trial, whom: str) -> str:
    """The same where files may not be larger than a limit, from a random moment on, on one rank or all."""
    copy_state(trial.whole.state(trial.ranks), trial.folder)
    took, size = trial.whole(trial.ranks).ended.seconds, trial.dice.randint(2**12, 2**17)

    def disturb(job: Job) -> bool:
        running = job.sleep(trial.dice.uniform(0.1, 0.9) * took)
        ranks = [pid for pid, rank in sorted(job.processes()) if rank is not None]
        for pid in ranks if whom == "all" else [trial.dice.choice(ranks)] if ranks else []:
            try:
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, size))
            except OSError:  # it has just ended
                continue
        return running

    ended = trial.run(disturb=disturb)
    first = judge_full(ended)
    return first if first not in (RIGHT, REFUSED) else resume(trial, ended, first)


def judge_full(ended: Ended) -> str:
    return RIGHT if ended.status == 0 else refusal(ended, FULL, tracebacks=True)


def resume(trial: Trial, before: Ended, first: str) -> str:
    """After a failure: the state from before is there, and leads to the right answer."""
    if before.status == 0:
        return trial.compare()
    ended = trial.run()
    if ended.status != 0 or went_on_from(ended.text) < EVERY:
        return HUNG if ended.hung else LOST
    return first if trial.compare() == RIGHT else WRONG


@contextmanager
def small_disk(trial: Trial) -> Iterator[Path]:
    """The folder of a trial as a file system of its own in memory."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", trial.folder], check=True)
    try:
        yield trial.folder
    finally:
        subprocess.run(["umount", "-l", trial.folder], check=True)


def resize(folder: Path, room: int) -> None:
    """Leave so many bytes of room, in pages."""
    used = shutil.disk_usage(folder).used + room
    subprocess.run(["mount", "-o", f"remount,size={used}", folder], check=True)


def can_mount() -> bool:
    """Whether we may make file systems."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        made = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True).returncode == 0
        if made:
            subprocess.run(["umount", folder], check=True)
        return made


def copy_state(source: Path, folder: Path) -> None:
    """Copy what belongs to the state of a job."""
    for path in source.glob("state.npz*"):
        shutil.copy2(path, folder)


# Damaged states


def with_a_damaged_state(trial: Trial) -> str:
    """A file of the state is damaged, or gone; the job says so, or finds the right answer all the same."""
    copy_state(trial.whole.state(trial.ranks), trial.folder)
    files = sorted(trial.folder.glob("state.npz*"))
    damage = trial.dice.choice(DAMAGES)
    path = trial.dice.choice(files)
    damage(trial, path)
    trial.said.append(f"# {damage.__name__}: {path.name}")
    trial.disturbed += 1
    ended = trial.run()
    return trial.compare() if ended.status == 0 else refusal(ended)


def cut_off(trial: Trial, path: Path) -> None:
    os.truncate(path, trial.dice.randrange(path.stat().st_size))


def empty(trial: Trial, path: Path) -> None:
    os.truncate(path, 0)


def flip_bits(trial: Trial, path: Path) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(trial.dice.randint(1, 20)):
        content[trial.dice.randrange(len(content))] ^= 1 << trial.dice.randrange(8)
    path.write_bytes(content)


def blank(trial: Trial, path: Path) -> None:
    content = bytearray(path.read_bytes())
    begin = trial.dice.randrange(len(content))
    size = len(content[begin : begin + 4096])
    content[begin : begin + size] = bytes(size)
    path.write_bytes(content)


def write_words(trial: Trial, path: Path) -> None:
    path.write_text("This is not a state.\n" * trial.dice.randint(1, 1000))


def remove(trial: Trial, path: Path) -> None:
    """Without the first file there is no state, and the job begins anew; without another it cannot go on."""
    path.unlink()


def take_another(trial: Trial, path: Path) -> None:
    """Put in its place the file of a job with other data."""
    other = trial.whole.state(trial.ranks, f"{JOB} --seed 7")
    rank = re.search(r"rank\d+", path.name)
    same = [p for p in sorted(other.glob("state.npz*")) if rank is None or rank[0] in p.name]
    shutil.copy2(same[0], path)


def change_numbers(trial: Trial, path: Path) -> None:
    """Write the file anew, as a valid one, in which some numbers make no sense."""
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    dice, known = (
        trial.dice,
        [name for name, array in arrays.items() if array.dtype.kind == "f" and array.size > 9],
    )
    name = dice.choice(known)
    array = arrays[name]
    some = np.array(array)
    some.flat[dice.randrange(some.size)] = dice.choice([np.nan, np.inf, -np.inf])
    arrays[name] = dice.choice(
        [some, array.astype(complex), array.astype("U"), array.astype("f4"), array[:-1]]
    )
    if dice.random() < 0.2:
        del arrays[name]
    rewrite(path, arrays)


def change_the_count(trial: Trial, path: Path) -> None:
    """Write the first file anew, with a number of iterations that makes no sense."""
    path = trial.folder / "state.npz"
    value = trial.dice.choice([-1, -10, 1e300, "many", None, 2.5, [1]])
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    for name, array in arrays.items():
        if array.dtype.kind == "U" and array.ndim == 0:
            header = json.loads(array.item())
            where = header.get("plain", header)
            where["nit"] = value
            arrays[name] = np.array(json.dumps(header))
    rewrite(path, arrays)


def rewrite(path: Path, arrays: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    path.write_bytes(buffer.getvalue())


def add_a_member(trial: Trial, path: Path) -> None:
    """Append to the archive something that is no array."""
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("x:0.npy" if trial.dice.random() < 0.5 else "more.npy", b"no array")


DAMAGES = [
    cut_off,
    empty,
    flip_bits,
    blank,
    write_words,
    remove,
    take_another,
    change_numbers,
    change_the_count,
]


# Links and neighbours


def among_links(trial: Trial) -> str:
    """Links lie where somebody might write, and files of others have names like ours: nothing happens to them."""
    copy_state(trial.whole.state(trial.ranks), trial.folder)
    treasure = trial.folder / "treasure"
    treasure.mkdir()
    (trial.folder / "fields").mkdir()
    names = [
        "picture.png",
        "state.npz",
        *(f"state.npz.rank{rank}.npz" for rank in range(1, 4)),
        *(f"fields/{name}" for name in ("d.npy", "truth.npy", "clean.npy", "data.json", *RESULTS)),
    ]
    kept = []
    for name in names:
        for ending in (".tmp", ".part", ".partial", ".new", "~"):
            victim = treasure / f"{name.replace('/', '.')}{ending}"
            victim.write_text("a treasure")
            (trial.folder / f"{name}{ending}").symlink_to(victim)
            kept.append(victim)
    for rank in range(4):
        neighbour = trial.folder / f"state.npz.rank{rank}.notes.txt"
        neighbour.write_text("a treasure")
        kept.append(neighbour)
    trial.disturbed += 1
    ended = trial.run()
    for path in kept:
        if not path.exists() or path.read_text(errors="replace") != "a treasure":
            trial.said.append(f"# {path.relative_to(trial.folder)} is not what it was")
            return LOST
    return trial.compare() if ended.status == 0 else refusal(ended)


# Another problem


def with_the_state_of_another(trial: Trial) -> str:
    """The state of one problem is given to another one."""
    copy_state(trial.whole.state(trial.ranks), trial.folder)
    other = f"{JOB} {trial.dice.choice(OTHERS)}"
    trial.disturbed += 1
    ended = trial.run(other)
    return trial.compare(arguments=other) if ended.status == 0 else refusal(ended)


# One rank errs


def erring(name: str) -> Callable[[Trial], str]:
    """A small program in which one rank errs."""

    def errs(trial: Trial) -> str:
        from .program import TOLD

        module = ("-m", "tools.soak.program", name)
        guilty = trial.dice.randrange(trial.ranks)
        ended = run(python(*module, str(guilty)), trial.folder, trial.ranks, trial.limit)
        trial.disturbed += 1
        trial.say(f"$ {name}, rank {guilty}", ended)
        if ended.status == 0:
            expected = trial.whole(trial.ranks, (*module, "-1")).ended
            return RIGHT if answers(ended.text) == answers(expected.text) else WRONG
        told = TOLD[name]
        said = "\n".join(line for line in ended.text.splitlines() if not LAUNCHERS.search(line))
        if not ended.hung and told is not None and re.search(told, said) is None:
            return UNCLEAR
        return HUNG if ended.hung else REFUSED

    return errs


#: Lines in which a launcher, and not the program, speaks of a rank.
LAUNCHERS = re.compile(r"MPI_ABORT|MPI_Abort|Process name|process rank|^rank \d found")


def answers(text: str) -> list[str]:
    """What the ranks have found."""
    return sorted(re.findall(r"rank \d+ found .*", text))


#: For each kind: its trial, on how many ranks, and how many of a hundred trials are of it.
KINDS: dict[str, tuple[Callable[[Trial], str], tuple[int, ...], float]] = {
    "kill -9, the whole job": (killed("job"), (1, 2, 3), 9),
    "kill -9, one rank": (killed("one"), (2, 3), 9),
    "kill -9, then other ranks": (killed("job", other=True), (1, 2, 3), 4),
    "SIGTERM, all ranks": (told_to_end(signal.SIGTERM, "ranks"), (1, 2, 3), 5),
    "SIGTERM, one rank": (told_to_end(signal.SIGTERM, "one"), (2, 3), 4),
    "SIGINT, all ranks": (told_to_end(signal.SIGINT, "ranks"), (1, 2, 3), 4),
    "SIGINT, one rank": (told_to_end(signal.SIGINT, "one"), (2, 3), 4),
    "full disk": (on_a_full_disk, (1, 2, 3), 6),
    "file too large, all ranks": (partial(beyond_a_limit, whom="all"), (1, 2, 3), 3),
    "file too large, one rank": (partial(beyond_a_limit, whom="one"), (2, 3), 3),
    "damaged state": (with_a_damaged_state, (1, 2, 3), 15),
    "state of another problem": (with_the_state_of_another, (1, 2, 3), 6),
    "links in the way": (among_links, (1, 2, 3), 3),
}
#: All programs in which a rank errs are one kind.
ERRS, ERRS_RANKS, ERRS_SHARE = "one rank errs", (2, 3), 30
