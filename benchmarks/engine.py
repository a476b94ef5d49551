"""The engine alone: models of very many very small operations, where all the time is overhead; and its memory.

Values are arrays of ten numbers, so that NumPy's own cost for an operation is a fraction of a microsecond. All times are
microseconds per operation: if a column stays the same from a hundred to ten thousand operations, the cost is linear. The last row of a
case says so in a number: the exponent p in "time grows like n^p" between the two largest sizes.

The cases:

chain   y = y * 1.0001; y = y + 0.1; ... one after the other
fan     y = y + x * c for many c: one value used very often, whose cotangent is a long sum
nest    ten calls of an operator that is ten calls of an operator ... that is a chain of ten operations
wide    one operator that takes the list of all x * c, and sums it

The measures:

build       writing the model down
first run, first gradient     with everything that is done only once for a model
second gradient      the one after the first: nothing is built any more
run, gradient, jvp, gnp, hvp  any later one: value; value and gradient; value and tangent; value and Gauss-Newton product; value,
            gradient and Hessian-vector product
NumPy       the same operations without any engine
autograd    value and gradient by HIPS autograd, which writes its tape down anew each time; so its peer is `gradient` for a model
            that is used often, and build + first gradient for one that is used once
PyTorch, JAX, vmad   value and gradient, if they are installed: PyTorch and JAX operation by operation, without compilation. A peer
            that would take longer than the budget is left out at larger sizes.

A second table has the bytes per operation that a model, its plans and its tapes take; a third compares large arrays with the same
gradient written by hand: its time, and the peak of its memory in arrays.

`make bench` installs autograd. The other peers are large, or need to be looked for: `pip install '.[bench-large]'` installs PyTorch, JAX
and vmad.
"""

import argparse
import gc
import math
import os
import time
import tracemalloc
from functools import partial

import numpy as np
from vmad_lit import Builder, autooperator, operator
from vmad_lit.core.error import BrokenPrimitive
from vmad_lit.core.operator import ZeroGradient

from .common import best, describe, machine, optional, save, table

PEERS = dict(autograd="autograd", PyTorch="torch", JAX="jax", vmad="vmad")


@operator
class total:
    """The sum of a list of arrays."""

    ain = "xs"
    aout = "y"
    hvp = ZeroGradient

    def apl(node, xs):
        return sum(xs)

    def rcd(node, xs, y):
        return dict(n=len(xs))

    def vjp(node, _y, n):
        return dict(_xs=[_y] * n)

    def jvp(node, xs_):
        return sum(xs_)


@autooperator("x -> y")
def nested(x, n):
    if n <= 10:
        return chain(x, n)
    for i in range(10):
        x = nested(x, n=n // 10)
    return x


# -- The cases: functions of a value and a number of operations, for symbols and for arrays ----------------------------


def chain(x, n):
    for i in range(n // 2):
        x = x * 1.0001
        x = x + 0.1
    return x


def fan(x, n):
    y = x
    for i in range(n // 2):
        y = y + x * 0.01
    return y


def wide(x, n):
    terms = [x * 0.01 for i in range(n - 1)]
    return sum(terms[1:], terms[0]) if not hasattr(x, "_name") else total(terms)


def nest(x, n):
    return nested(x, n) if hasattr(x, "_name") else chain(x, n)


CASES = dict(chain=chain, fan=fan, nest=nest, wide=wide)


# -- Ours --------------------------------------------------------------------------------------------------------------


def build(case, n, Builder=Builder):
    with Builder() as m:
        x = m.input("x")
        m.output(y=case(x, n))
    return m


class Ours:
    """The functions to measure, for one model."""

    x = np.linspace(0.0, 1.0, 10)
    v = np.ones(10)

    def __init__(self, case, n, Builder=Builder):
        self.model = build(case, n, Builder)

    def run(self):
        return self.model.compute("y", init=dict(x=self.x))

    def gradient(self):
        return self.model.compute_with_vjp(init=dict(x=self.x), v=dict(_y=self.v))

    def jvp(self):
        return self.model.compute_with_jvp("y", init=dict(x=self.x), v=dict(x_=self.v))

    def gnp(self):
        return self.model.compute_with_gnDp("y", init=dict(x=self.x), v=dict(x_=self.v))

    def hvp(self):
        return self.model.compute_with_hvp("y", init=dict(x=self.x), v=dict(x_=self.v, _y=self.v))


def first(case, n, what, before=None):
    """A function that computes something of a fresh model, which is built outside the clock; `before` is computed there, too."""
    models = [Ours(case, n) for i in range(3)]
    if before:
        for model in models:
            getattr(model, before)()
    return lambda: getattr(models.pop(), what)()


def made(model):
    """How many plans and derived models a model has made so far, with those of the models within."""
    plans = list(model._plans.values())
    derived = [other for plan in plans for other in plan.derived.values()]
    return len(plans) + len(derived) + sum(made(other) for other in [*derived, *model.shared.values()])


# -- The others ----------------------------------------------------------------------------------------------------------


def by_autograd(autograd, case, n):
    function = autograd.value_and_grad(lambda x: autograd.numpy.sum(case(x, n)))
    return lambda: function(Ours.x)


def by_torch(torch, case, n):
    torch.set_num_threads(1)
    start = torch.tensor(Ours.x)

    def value_and_gradient():
        x = start.clone().requires_grad_()
        y = case(x, n).sum()
        y.backward()
        return y, x.grad

    return value_and_gradient


def by_jax(jax, case, n):
    jax.config.update("jax_enable_x64", True)
    function = jax.value_and_grad(lambda x: case(x, n).sum())
    return lambda: jax.block_until_ready(function(Ours.x))


def by_vmad(vmad, case, n):
    if (
        case not in (chain, fan) or n > 300
    ):  # a thousand operations take ten seconds and more: its cost is quadratic
        return None
    return Ours(case, n, vmad.Builder).gradient


def peers(case, n, slow):
    """What the installed peers compute, by name, but for those that were too slow already."""
    found = {}
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    for name, package in PEERS.items():
        module = optional(package)
        if module is not None and name not in slow:
            if name == "autograd":
                optional("autograd.numpy")
            function = dict(autograd=by_autograd, PyTorch=by_torch, JAX=by_jax, vmad=by_vmad)[name](
                module, case, n
            )
            if function is not None:
                found[name] = function
    return found


def measure(case, n, slow=(), repeat=5, budget=2.0):
    """All times of a case at one size, in microseconds per operation, by name."""
    timer = time.process_time
    once = dict(
        first_run=first(case, n, "run"),
        first_gradient=first(case, n, "gradient"),
        second_gradient=first(case, n, "gradient", before="gradient"),
    )
    often = Ours(case, n)
    functions = dict(run=often.run, gradient=often.gradient, jvp=often.jvp, gnp=often.gnp)
    try:
        often.hvp()
        functions["hvp"] = often.hvp
    except BrokenPrimitive:  # an operator that keeps its curvature to itself
        pass
    functions["NumPy"] = lambda: case(Ours.x, n)
    functions |= peers(case, n, slow)
    for function in functions.values():  # the first time does not count
        function()
    seconds = best(dict(build=lambda: build(case, n)), repeat, budget / 4, timer)
    seconds |= best(once, min(repeat, 3), budget, timer)
    seconds |= best(functions, repeat, budget, timer)
    return {name: 1e6 * s / n for name, s in seconds.items()}


OURS = "build", "first_run", "run", "first_gradient", "second_gradient", "gradient", "jvp", "gnp", "hvp"
COLUMNS = *OURS, "NumPy", *PEERS


def study(names=tuple(CASES), sizes=(100, 1000, 10000), repeat=5, budget=2.0):
    """Measure cases at several sizes; a list of dicts, each with the names `case`, `n`, and those of the measures."""
    results = []
    for name in names:
        slow = set()
        for n, following in zip(sizes, [*sizes[1:], 0]):
            row = measure(CASES[name], n, slow, repeat, budget)
            slow.update(peer for peer in PEERS if row.get(peer, 0.0) * 1e-6 * following > budget)
            results.append(dict(case=name, n=n, **row))
    return results


def exponents(small, large):
    """For each measure the p in time = n^p, from the times per operation at two sizes."""
    ratio = math.log(large["n"] / small["n"])
    return {
        name: 1.0 + math.log(large[name] / small[name]) / ratio
        for name in COLUMNS
        if small.get(name) and large.get(name)
    }


# -- Memory ------------------------------------------------------------------------------------------------------------


def allocated(function):
    """What a function returns, the bytes that are allocated after it, and the most that were meanwhile."""
    gc.collect()
    tracemalloc.start()
    try:
        result = function()
        gc.collect()
        return result, *tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()


def bytes_of(case, n):
    """The bytes per operation that stay allocated for a model and for what is made of it, by name."""
    build(case, n)
    model, of_model, _ = allocated(lambda: build(case, n))
    init, v = dict(x=Ours.x), dict(_y=Ours.v)
    _, of_run, _ = allocated(lambda: model.compute("y", init))
    (_, tape), of_recording, _ = allocated(lambda: model.compute("y", init, return_tape=True))
    (_, tape), of_tape, _ = allocated(lambda: model.compute("y", init, return_tape=True))
    vjp, of_sweep, _ = allocated(tape.get_vjp)
    _, of_sweep_plan, _ = allocated(lambda: vjp.compute("_x", v))
    sizes = dict(model=of_model, plan=of_run, recording_plan=of_recording - of_tape, tape=of_tape)
    sizes |= dict(reverse_sweep=of_sweep, plan_of_sweep=of_sweep_plan)
    return {name: size / n for name, size in sizes.items()}


def study_memory(names=tuple(CASES), sizes=(1000, 10000)):
    """`bytes_of` for cases at several sizes."""
    return [dict(case=name, n=n, **bytes_of(CASES[name], n)) for name in names for n in sizes]


def report_memory(results):
    shown = [name for name in results[0] if name not in ("case", "n")]
    rows = [[f"{row['case']} {row['n']}", *(row[name] for name in shown)] for row in results]
    table(["bytes per operation", *(name.replace("_", " ") for name in shown)], rows)
    print(flush=True)


# -- Large arrays, and the same by hand --------------------------------------------------------------------------------


def horner(x, n):
    y = x
    for i in range(n):
        y = y * x + x
    return y


def horner_by_hand(x, n, _y):
    kept = [x]
    for i in range(n):
        kept.append(kept[-1] * x)
        kept[-1] += x
    y, _x = kept.pop(), np.zeros_like(x)
    for i in range(n):
        _x += _y
        _x += _y * kept.pop()
        _y = _y * x
    _x += _y
    return y, _x


def uses(x, n):
    y = x * x
    for i in range(n - 1):
        y = y + x * x
    return y


def uses_by_hand(x, n, _y):
    y, _x = x * x, np.zeros_like(x)
    for i in range(n - 1):
        y += x * x
    for i in range(n):
        part = _y * x
        _x += part
        _x += part
    return y, _x


LARGE = dict(horner=(horner, horner_by_hand), uses=(uses, uses_by_hand))


def study_large(size=1000000, n=20, repeat=5, budget=4.0):
    """Gradients for large arrays, ours and by hand: seconds, and the peak of the memory in arrays of that size."""
    results = []
    x, v = np.linspace(0.0, 1.0, size), np.ones(size)
    for name, (function, by_hand) in LARGE.items():
        model = build(function, n)
        ours = partial(model.compute_with_vjp, init=dict(x=x), v=dict(_y=v))
        functions = dict(ours=ours, by_hand=partial(by_hand, x, n, v))
        for compute in functions.values():
            compute()
        peaks = {who: allocated(compute)[2] / x.nbytes for who, compute in functions.items()}
        seconds = best(functions, repeat, budget, time.process_time)
        results.append(
            dict(case=name, size=size, n=n, **{f"{who}_arrays": peaks[who] for who in peaks}, **seconds)
        )
    return results


def report_large(results):
    table(
        ["large arrays", "size", "uses", "ours, arrays", "by hand, arrays", "ours, s", "by hand, s", "ratio"],
        [
            [
                row["case"],
                str(row["size"]),
                row["n"],
                row["ours_arrays"],
                row["by_hand_arrays"],
                row["ours"],
                row["by_hand"],
                row["ours"] / row["by_hand"],
            ]
            for row in results
        ],
    )


# -- Reports -----------------------------------------------------------------------------------------------------------


def report(results):
    shown = [name for name in COLUMNS if any(name in row for row in results)]
    for case in dict.fromkeys(row["case"] for row in results):
        rows = [row for row in results if row["case"] == case]
        lines = [[str(row["n"]), *(row.get(name) for name in shown)] for row in rows]
        if len(rows) > 1:
            powers = exponents(*rows[-2:])
            lines.append(["n^p, p =", *(f"{powers[name]:.2f}" if name in powers else "-" for name in shown)])
        table([case, *(name.replace("_", " ") for name in shown)], lines)
        print("  ".join(f"{name} {value:.2f}" for name, value in ratios(rows[-1]).items()), "\n", flush=True)


def ratios(row):
    """The ratios that we watch."""
    out = {"run / NumPy": row["run"] / row["NumPy"]}
    for peer in PEERS:
        if peer in row:
            out[f"gradient / {peer}"] = row["gradient"] / row[peer]
            out[f"build + first gradient / {peer}"] = (row["build"] + row["first_gradient"]) / row[peer]
    return out


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="benchmarks engine", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--full", action="store_true", help="up to 100000 operations, and arrays of ten million numbers"
    )
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of operations")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", metavar="FILE", help="write the numbers to a file")
    args, _ = parser.parse_known_args(argv)
    host = machine("autograd", "torch", "jax", "vmad")
    print(describe(host), "\nmicroseconds per operation\n")
    sizes = args.sizes or [100, 1000, 10000, *([100000] if args.full else [])]
    results = study(args.cases, sizes, args.repeat)
    report(results)
    memory = study_memory(args.cases, [n for n in sizes if n >= 1000] or sizes)
    report_memory(memory)
    large = [*study_large(1000000), *(study_large(10000000, n=5) if args.full else [])]
    report_large(large)
    if args.json:
        save(args.json, host, unit="microseconds per operation", results=results, memory=memory, large=large)


if __name__ == "__main__":
    main()
