"""Doors to other libraries: their functions as operators of ours, and our models as functions of theirs."""

from vmad_lit.interop.blackbox import NotSmooth, black_box

__all__ = ["NotSmooth", "black_box"]

from vmad_lit.interop.jax import from_jax

__all__ += ["from_jax"]

from vmad_lit.interop.host import to_scipy
from vmad_lit.interop.jax import to_jax

__all__ += ["to_jax", "to_scipy"]

from vmad_lit.interop.torch import from_torch, to_torch

__all__ += ["from_torch", "to_torch"]
