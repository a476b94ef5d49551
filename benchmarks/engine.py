"""The engine alone: models of very many very small operations, where all the time is overhead.

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
run, gradient, jvp, gnp       any later one: value; value and gradient; value and tangent; value and Gauss-Newton product
NumPy       the same operations without any engine
autograd    value and gradient by HIPS autograd, which writes its tape down anew each time; so its peer is `gradient` for a model
            that is used often, and build + first gradient for one that is used once
PyTorch, vmad   value and gradient, if they are installed
"""

import argparse
import math
import time

import numpy as np
from vmad_lit import Builder, autooperator, operator

from .common import best, describe, machine, optional, save, table

PEERS = dict(autograd="autograd", PyTorch="torch", vmad="vmad")


@operator
class total:
    """The sum of a list of arrays."""

    ain = "xs"
    aout = "y"

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


def first(case, n, what):
    """A function that computes something of a fresh model, which is built outside the clock."""
    models = [Ours(case, n) for i in range(3)]
    return lambda: getattr(models.pop(), what)()


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


def by_vmad(vmad, case, n):
    if case not in (chain, fan):
        return None
    return Ours(case, n, vmad.Builder).gradient


def peers(case, n, slow):
    """What the installed peers compute, by name, but for those that were too slow already."""
    found = {}
    for name, package in PEERS.items():
        module = optional(package)
        if module is not None and name not in slow:
            if name == "autograd":
                optional("autograd.numpy")
            function = dict(autograd=by_autograd, PyTorch=by_torch, vmad=by_vmad)[name](module, case, n)
            if function is not None:
                found[name] = function
    return found


def measure(case, n, slow=(), repeat=5, budget=2.0):
    """All times of a case at one size, in microseconds per operation, by name."""
    timer = time.process_time
    once = dict(first_run=first(case, n, "run"), first_gradient=first(case, n, "gradient"))
    often = Ours(case, n)
    functions = dict(run=often.run, gradient=often.gradient, jvp=often.jvp, gnp=often.gnp)
    functions["NumPy"] = lambda: case(Ours.x, n)
    functions |= peers(case, n, slow)
    for function in functions.values():  # the first time does not count
        function()
    seconds = best(dict(build=lambda: build(case, n)), repeat, budget / 4, timer)
    seconds |= best(once, min(repeat, 3), budget, timer)
    seconds |= best(functions, repeat, budget, timer)
    return {name: 1e6 * s / n for name, s in seconds.items()}


COLUMNS = "build", "first_run", "run", "first_gradient", "gradient", "jvp", "gnp", "NumPy", *PEERS


def study(names=tuple(CASES), sizes=(100, 1000, 10000), repeat=5, budget=2.0):
    """Measure cases at several sizes; a list of dicts, each with the names `case`, `n`, and those of the measures."""
    results = []
    for name in names:
        slow = set()
        for n in sizes:
            row = measure(CASES[name], n, slow, repeat, budget)
            slow.update(peer for peer in PEERS if row.get(peer, 0.0) * 1e-6 * n > budget)
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
    parser = argparse.ArgumentParser(prog="benchmarks engine", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--full", action="store_true", help="up to 100000 operations")
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of operations")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", metavar="FILE", help="write the numbers to a file")
    args, _ = parser.parse_known_args(argv)
    host = machine("autograd", "torch", "vmad")
    print(describe(host), "\nmicroseconds per operation\n")
    sizes = args.sizes or [100, 1000, 10000, *([100000] if args.full else [])]
    results = study(args.cases, sizes, args.repeat)
    report(results)
    if args.json:
        save(args.json, host, unit="microseconds per operation", results=results)


if __name__ == "__main__":
    main()
