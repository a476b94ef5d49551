"""Distributed Fourier transforms behind the interface of pfft-python.

Local transforms are those of ducc0, redistribution is one Alltoallw of mpi4py. Transforms are unnormalised.
"""
from .partition import Direction, Flags, LocalBuffer, Partition, ProcMesh, Type, split_size_2d
from .plan import Plan, get_num_threads, set_num_threads

__version__ = "0.1.24+ducc0"
__all__ = ["Direction", "Flags", "LocalBuffer", "Partition", "Plan", "ProcMesh", "Type", "split_size_2d",
           "get_num_threads", "set_num_threads"]
