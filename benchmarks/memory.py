"""The memory of gradients of long chains: the peak against the number of states that the schedule keeps.

A chain of n steps on an array; the gradient of its result. Memory is what NumPy and Python allocate, at the peak of the gradient,
in units of a state. If an engine keeps its promise, then "peak - kept", which is the tape of one step and what the step works with,
is the same for all lengths and all schedules.

The measures:

kept, on disk   how many states the schedule has in memory and on disk, at most
peak            the memory at the peak, in states
rest            peak - kept
runs            how often each step is run
time            of value and gradient, in units of that with the full tape

The peer is HIPS autograd, with its full tape and with its `checkpoint` around each step.
"""

import argparse
import time
import tracemalloc

import numpy as np
from vmad_lit import Builder, autooperator, operator
from vmad_lit.core.chain import checkpoint

from .common import best, describe, machine, optional, save, table

runs = 0


@operator
class counted:
    """The identity, which counts how often it is run."""

    ain = "x"
    aout = "y"

    def apl(node, x):
        global runs
        runs += 1
        return x

    def vjp(node, _y):
        return _y


def formula(x):
    return x + 0.1 * x * (1.0 - x * x)


@autooperator("x -> y")
def step(x):
    return formula(counted(x))


def repeated(step):
    """A function from a number to the chain of so many steps."""

    def chain_of(n):
        def chain(x):
            for i in range(n):
                x = step(x)
            return x

        return chain

    return chain_of


def scheduled(**policy):
    return lambda n: checkpoint(step, n, **policy)


POLICIES = {
    "full tape": repeated(step),
    "forgetful steps": repeated(step.forgetful),
    "revolve, 5": scheduled(schedule="revolve", ram=5),
    "revolve, 20": scheduled(schedule="revolve", ram=20),
    "multistage, 5 and 20 on disk": scheduled(ram=5, disk=20),
    "two-level, period 30, 5": scheduled(schedule="two-level", period=30, ram=5),
    "disk": scheduled(schedule="disk"),
}


def kept_states(chain):
    """How many states the schedule of a chain keeps at once, at most, in memory and on disk."""
    kept, most = set(), dict(RAM=0, DISK=0)
    for action in chain.actions.forward + chain.actions.reverse:
        if (
            getattr(action, "write_ics", False)
            or getattr(action, "write_adj_deps", False)
            and action.storage.name == "DISK"
        ):
            kept.add((action.storage.name, action.n0))
        elif type(action).__name__ == "Move":
            kept.discard((action.from_storage.name, action.n))
        for place in most:
            most[place] = max(most[place], sum(where == place for where, _ in kept))
    return most["RAM"], most["DISK"]


def gradient_of(chain, x):
    """A function that computes the value and the gradient of a chain."""
    with Builder() as m:
        m.output(y=chain(m.input("x")))
    return lambda: m.compute_with_vjp(init=dict(x=x), v=dict(_y=x))[1][0]


def by_autograd(chain_of, n, x):
    autograd = optional("autograd")
    if autograd is None:
        return None
    optional("autograd.numpy")
    make = autograd.make_vjp(repeated(chain_of(autograd))(n))
    return lambda: make(x)[0](x)


PEERS = {
    "autograd": lambda autograd: formula,
    "autograd, checkpoint": lambda autograd: autograd.checkpoint(formula),
}


def peak_of(function, unit):
    """The memory that a function allocates at its peak."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1] / unit
    finally:
        tracemalloc.stop()


def measure(name, n, size=10_000, repeat=3, budget=2.0):
    """All measures of a policy for a chain of n steps, as a dict, and the function that computes the gradient."""
    global runs
    x = np.linspace(0.0, 1.0, size)
    row = dict(policy=name, n=n)
    if name in POLICIES:
        chain = POLICIES[name](n)
        gradient = gradient_of(chain, x)
        if hasattr(chain, "actions"):
            row["kept"], row["on disk"] = kept_states(chain)
    else:
        gradient = by_autograd(PEERS[name], n, x)
        if gradient is None:
            return None
    gradient()  # the first time does not count
    runs = 0
    gradient()
    if name in POLICIES:
        row["runs"] = runs / n
    row["peak"] = peak_of(gradient, x.nbytes)
    if "kept" in row:
        row["rest"] = row["peak"] - row["kept"]
    row["seconds"] = best(dict(it=gradient), repeat, budget, time.process_time)["it"]
    return row


def study(sizes=(10, 100, 1000), names=(*POLICIES, *PEERS), size=10_000, repeat=3, budget=2.0):
    """Measure policies for several lengths; a list of dicts."""
    results = []
    for n in sizes:
        rows = [measure(name, n, size, repeat, budget) for name in ("full tape", *names)]
        unit = min(row["seconds"] for row in rows if row and row["policy"] == "full tape")
        for row in rows[1:]:
            if row is not None:
                results.append({**row, "time": row["seconds"] / unit})
    return results


COLUMNS = "kept", "on disk", "peak", "rest", "runs", "time"


def report(results):
    for n in dict.fromkeys(row["n"] for row in results):
        rows = [row for row in results if row["n"] == n]
        table(
            [f"{n} steps", *COLUMNS], [[row["policy"], *(row.get(name) for name in COLUMNS)] for row in rows]
        )
        print(flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="benchmarks memory", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 100, 1000], help="numbers of steps")
    parser.add_argument("--size", type=int, default=10_000, help="numbers in a state")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", metavar="FILE", help="write the numbers to a file")
    args, _ = parser.parse_known_args(argv)
    host = machine("autograd", "checkpoint_schedules")
    print(describe(host), "\n")
    results = study(args.sizes, size=args.size, repeat=args.repeat)
    report(results)
    if args.json:
        save(args.json, host, size=args.size, results=results)


if __name__ == "__main__":
    main()
