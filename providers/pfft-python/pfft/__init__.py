"""Distributed Fourier transforms behind the interface of pfft-python.

The local transforms are those of ducc0; the redistribution is an Alltoallv of mpi4py. Transforms are not
normalised. ``OMP_NUM_THREADS`` or :func:`set_num_threads` sets the number of threads of a rank.
"""

from .partition import Direction, Flags, LocalBuffer, Partition, ProcMesh, Type, split_size_2d

__version__ = "0.1.24+ducc0"
__all__ = ["Direction", "Flags", "LocalBuffer", "Partition", "ProcMesh", "Type", "split_size_2d"]

from .plan import Plan, get_num_threads, listeners, set_num_threads

__all__ += ["Plan", "get_num_threads", "listeners", "set_num_threads"]
