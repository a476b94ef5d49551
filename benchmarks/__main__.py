"""Run the benchmarks: `python -m benchmarks [--json PATH] [NAME ...] [options of the benchmark]`; the names are in ALL and LONG."""

import argparse
import importlib
import importlib.util
import os
import sys

ALL = "engine", "fft", "kernels", "limits", "memory", "nbody", "reconstruction", "samplers"
LONG = (
    "bandpowers",
    "calibration",
    "microcanonical",
    "sampling",
)  # hours, or a peer; only if they are asked for


def place(path, name, alone):
    """The file for the numbers of a benchmark."""
    stem, extension = os.path.splitext(path)
    if extension != ".json":
        return os.path.join(path, name + ".json")
    return path if alone else f"{stem}-{name}.json"


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="name",
        help=f"which of {', '.join(ALL)}; all of them if none is given; or {', '.join(LONG)}",
    )
    parser.add_argument(
        "--json",
        metavar="PATH",
        help="write the numbers to PATH if it ends in .json (several: beside it, by name), else to PATH/name.json",
    )
    args, options = parser.parse_known_args(argv)
    for name in args.names:
        if name not in ALL + LONG:
            parser.error(f"there is no benchmark {name!r}; there are {', '.join(ALL + LONG)}")
    first_rank = os.environ.get("PMI_RANK", os.environ.get("OMPI_COMM_WORLD_RANK", "0")) == "0"
    for name in args.names or ALL:
        if importlib.util.find_spec(f"benchmarks.{name}") is None:
            continue
        if first_rank:
            print(f"\n== {name} ==", flush=True)
        target = ["--json", place(args.json, name, len(args.names) == 1)] if args.json else []
        importlib.import_module(f"benchmarks.{name}").main([*options, *target])


if __name__ == "__main__":
    sys.exit(main())
