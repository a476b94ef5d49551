"""This package beside its peers: `python -m benchmarks`, or one part of it, `python -m benchmarks engine --full`.

Each module has a `main(argv)` that prints a table and, with `--json FILE`, writes its numbers to a file. Times depend on the
machine and on what else it does; so all that is to be compared is measured in the same run, in turns, and the
least of several times counts.
"""
