"""PyTorch: its modules as operators, and our models as its functions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from vmad_lit.core.error import BadArgument, did_you_mean, needed_for
from vmad_lit.core.operator import Operator
from vmad_lit.core.stdlib.operators import Array
from vmad_lit.interop.foreign import (
    Arrays,
    MaybeArrays,
    Others,
    name_of,
    operator_of,
    read_signature,
)
from vmad_lit.interop.host import Host, host_of
from vmad_lit.interop.trees import Tree, TreeFunction


def library() -> Any:
    """PyTorch, or an error that says how to install it."""
    with needed_for("functions of PyTorch", extra="torch"):
        import torch
    return torch


def to_tensor(array: Array) -> Any:
    """A tensor in the memory of an array, or of a copy where PyTorch cannot use it."""
    torch = library()
    plain = array.flags.writeable and all(step >= 0 for step in array.strides) and array.dtype.isnative
    return torch.from_numpy(array if plain else np.array(array, dtype=array.dtype.newbyteorder("=")))


def to_array(tensor: Any, given: Sequence[Array] = ()) -> Array:
    """An array in the memory of a tensor, but not in that of one of the arrays that were `given`."""
    array = tensor.detach().resolve_conj().resolve_neg().cpu().numpy()
    return array.copy() if any(np.may_share_memory(array, other) for other in given) else array


class TorchFunction(TreeFunction):
    """A function of PyTorch, with its derivatives."""

    def on(self, others: Others) -> Callable[..., tuple[Any, ...]]:
        """The function from tensors to a tuple of tensors. What goes in is brought to the widest precision among it."""
        torch = library()
        constants = {name: to_tensor(v) if isinstance(v, np.ndarray) else v for name, v in others.items()}

        def function(*x: Any) -> tuple[Any, ...]:
            wide = max((t.real.dtype for t in x), key=lambda dtype: torch.finfo(dtype).bits)
            return self.call([t.to(torch.promote_types(t.dtype, wide)) for t in x], constants)

        return function

    # Ask PyTorch for derivatives
    def value(self, x: Arrays, others: Others) -> Arrays:
        """The results."""
        torch = library()
        with torch.no_grad():
            return [to_array(y, x) for y in self.on(others)(*map(to_tensor, x))]

    def pull(self, x: Arrays, others: Others, cotangents: MaybeArrays) -> Arrays:
        """The cotangents of the arguments, in the convention that PyTorch and we share."""
        return [to_array(_x, x) for _x in self.back(others, cotangents)(*map(to_tensor, x))]

    def back(self, others: Others, cotangents: MaybeArrays) -> Callable[..., tuple[Any, ...]]:
        """The function from arguments to their cotangents."""
        torch = library()

        def function(*x: Any) -> tuple[Any, ...]:
            y, pull = torch.func.vjp(self.on(others), *x)
            return tuple(pull(tuple(map(as_derivative, cotangents, y))))

        return function

    def push(self, x: Arrays, others: Others, tangents: MaybeArrays) -> Arrays:
        """The tangents of the results."""
        torch = library()
        x_ = tuple(map(as_derivative, tangents, map(to_tensor, x)))

        def transposed() -> Any:
            """The transpose of `pull`, which is linear in the cotangents."""
            y = self.on(others)(*map(to_tensor, x))
            zeros = [torch.zeros_like(part) for part in y]
            pull = lambda *c: torch.func.vjp(self.on(others), *map(to_tensor, x))[1](c)  # noqa: E731
            return torch.func.vjp(pull, *zeros)[1](x_)

        return [to_array(y_) for y_ in self.forwards(self.on(others), x, x_, transposed)]

    def bend(self, x: Arrays, others: Others, cotangents: MaybeArrays, tangents: MaybeArrays) -> Arrays:
        """The derivative of `pull` along tangents, or its transpose, which is the same."""
        torch = library()
        x_ = tuple(map(as_derivative, tangents, map(to_tensor, x)))
        back = self.back(others, cotangents)
        transposed = lambda: torch.func.vjp(back, *map(to_tensor, x))[1](x_)  # noqa: E731
        return [to_array(_x_) for _x_ in self.forwards(back, x, x_, transposed)]

    def forwards(
        self, function: Callable[..., Any], x: Arrays, x_: Any, transposed: Callable[[], Any]
    ) -> Any:
        """The derivative of a function along tangents; where PyTorch has none, what stands in for it."""
        torch = library()
        if self.both_ways:
            try:
                return torch.func.jvp(function, tuple(map(to_tensor, x)), x_)[1]
            except (RuntimeError, NotImplementedError) as error:
                if "forward" not in str(error) and "jvp" not in str(error):
                    raise
                self.both_ways = False
        return transposed()


def as_derivative(derivative: Any, value: Any) -> Any:
    """A tangent or cotangent of the type of its value, zeros for None."""
    torch = library()
    return torch.zeros_like(value) if derivative is None else to_tensor(derivative).to(value.dtype)


def from_torch(
    module: Callable[..., Any],
    signature: str | None = None,
    parameters: str | None = "flat",
) -> Operator:
    """An operator of a module of PyTorch, or of a function of tensors, with first derivatives in both modes and second ones.

    Parameters
    ----------
    module :
        a ``torch.nn.Module``, whose own parameters stay as they are, or a function.
    signature : str
        names of the arguments that have derivatives, and of the results, ``"x -> y"``; without the parameters of a
        module. What is left of the arguments of `forward` are hyper-parameters. By default all arguments without a
        default, and ``y``.
    parameters : str or None
        "flat" if the parameters of a module are its first argument, ``parameters``, as one flat array; "named" if each is
        an argument by itself, ``parameters_layer_weight``; None if they are constants.

    Returns
    -------
    Operator
        Its `flatten(dict(module.named_parameters()))` makes the value of the parameters (or the dictionary of values),
        `unflatten` the dictionary of arrays. Values keep their precision. Fields are taken point by
        point; parameters are the same on all ranks.
    """
    torch = library()
    if not isinstance(module, torch.nn.Module):
        ain, aout, hyper = read_signature(module, signature)
        return operator_of(TorchFunction(module, ain, aout, {}), hyper)
    ain, aout, hyper = read_signature(module.forward, signature)
    own = {name: p.detach() for name, p in module.named_parameters()}

    # Run the module with other parameters
    def run(parameters: Any = own, **inputs: Any) -> Any:
        first = next(value for value in inputs.values() if isinstance(value, torch.Tensor))
        cast = {name: p.to(torch.promote_types(p.dtype, first.real.dtype)) for name, p in parameters.items()}
        return torch.func.functional_call(module, cast, (), inputs)

    # Take the parameters of a module as a tree
    def take(tree: Any) -> list[Array]:
        missing = [name for name in own if name not in tree]
        if missing:
            raise BadArgument(f"the parameter '{missing[0]}' is missing" + did_you_mean(missing[0], tree))
        return [to_array(torch.as_tensor(tree[name])).copy() for name in own]

    run.__name__, run.__doc__ = name_of(module), type(module).__doc__
    trees = {}
    if parameters is not None and own:
        make = lambda arrays: dict(zip(own, arrays))  # noqa: E731
        trees["parameters"] = Tree("parameters", list(own), own, take, make, parameters)
    function = TorchFunction(run, [*trees, *ain], aout, trees)
    return operator_of(function, hyper, helpers=function.helpers())


def to_torch(
    subject: Any,
    like: Any,
    inputs: Collection[str] | None = None,
    outputs: Collection[str] | None = None,
    gather: bool = True,
    tapes: int = 4,
) -> Callable[..., Any]:
    """A differentiable function of PyTorch of a model, an operator, or the objective of a problem of ours.

    It can be differentiated in both modes, in reverse mode twice. Parameters are those of
    :func:`~vmad_lit.interop.jax.to_jax`.

    Returns
    -------
    function
        of tensors, by position or by name, that returns a tensor, or a tuple if there are several outputs, in the
        precision of the model. Of a problem, its attribute `flat` is the
        :class:`~vmad_lit.contrib.optimize.FlatProblem`. On many ranks all have to call it, and one at a time.
    """
    torch = library()
    host = host_of(subject, like, inputs, outputs, gather, tapes)
    run, m = runs_of(host), len(host.vout)

    # Take tensors by position and by name
    def call(*args: Any, **kwargs: Any) -> Any:
        x = [torch.as_tensor(a) for a in host.arrange(args, kwargs)]
        host.check([tuple(t.shape) for t in x])
        kinds = [torch.from_numpy(np.zeros(0, array.dtype)).dtype for array in host.inputs]
        y = run.apply(any(map(varies, x)), *(t.to(kind) for t, kind in zip(x, kinds)))
        return y[0] if m == 1 else y[:m]

    call.host, call.flat = host, getattr(host, "flat", None)  # type: ignore[attr-defined]
    return call


def runs_of(host: Host) -> Any:
    """A function of PyTorch of whether a run is to be kept, and of tensors; of the outputs, and the number of the run."""
    torch = library()
    n, m = len(host.names), len(host.vout)
    Asking: Any = asking()

    # Call a host with tensors
    def ask(kind: str, run: Any, *lists: Any) -> tuple[Any, ...]:
        """Tensors that the host returns."""
        arrays = [[to_array(t) for t in part] for part in lists]
        return tuple(map(torch.from_numpy, map(np.array, host.ask(kind, *arrays, run=int(run)))))

    # Ask for the outputs
    class Call(Asking):
        """The outputs, and the number of the run, if it is to be kept."""

        @staticmethod
        def forward(keep: bool, *x: Any) -> Any:
            if not keep:
                return *ask("value", 0, x), torch.tensor(0)
            y, run = host.start(list(map(to_array, x)))
            return *map(torch.from_numpy, map(np.array, y)), torch.tensor(run)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.mark_non_differentiable(output[-1])
            Asking.setup_context(ctx, (output[-1], *inputs[1:]), output)

        # Pass on what is asked of a run
        @classmethod
        def vmap(cls, info: Any, in_dims: Any, keep: bool, *x: Any) -> Any:
            return super().vmap(info, in_dims, keep or any(map(varies, x)), *x)

        @staticmethod
        def backward(ctx: Any, *cotangents: Any) -> Any:
            return None, *Pull.apply(*ctx.saved_tensors, *cotangents[:-1])

        @staticmethod
        def jvp(ctx: Any, _: None, *tangents: Any) -> Any:
            return *Push.apply(*ctx.saved_tensors, *filled(tangents, ctx.saved_tensors[1:])), None

    # Ask for tangents
    class Push(Asking):
        """The tangents of the outputs."""

        @staticmethod
        def forward(run: Any, *given: Any) -> Any:
            return ask("push", run, given[:n], given[n:])

        @staticmethod
        def backward(ctx: Any, *cotangents: Any) -> Any:
            run, x, tangents = apart(ctx, n)
            return None, *Bend.apply(run, *x, *cotangents, *tangents), *Pull.apply(run, *x, *cotangents)

    # Ask for cotangents
    class Pull(Asking):
        """The cotangents of the inputs."""

        @staticmethod
        def forward(run: Any, *given: Any) -> Any:
            return ask("pull", run, given[:n], given[n:])

        @staticmethod
        def backward(ctx: Any, *tangents: Any) -> Any:
            run, x, cotangents = apart(ctx, n)
            return None, *Bend.apply(run, *x, *cotangents, *tangents), *Push.apply(run, *x, *tangents)

        @staticmethod
        def jvp(ctx: Any, _: None, *tangents: Any) -> Any:
            run, x, cotangents = apart(ctx, n)
            changes = filled(tangents, [*x, *cotangents])
            pairs = zip(Bend.apply(run, *x, *cotangents, *changes[:n]), Pull.apply(run, *x, *changes[n:]))
            return tuple(bent + pulled for bent, pulled in pairs)

    class Bend(Asking):
        """The derivative of `Pull` along tangents."""

        @staticmethod
        def forward(run: Any, *given: Any) -> Any:
            return ask("bend", run, given[:n], given[n : n + m], given[n + m :])

    return Call


def asking() -> Any:
    """A class of functions of PyTorch that are given the number of a run first, and keep all that is given."""
    torch = library()
    Function: Any = torch.autograd.Function

    class Asking(Function):
        """What the functions below have in common: they are given the number of a run first, and keep all that is given."""

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @classmethod
        def vmap(cls, info: Any, in_dims: Any, *given: Any) -> Any:
            rows = []
            for i in range(info.batch_size):
                row = [t if dim is None else t.select(dim, i) for t, dim in zip(given, in_dims)]
                rows.append(cls.apply(*row))
            return tuple(map(torch.stack, zip(*rows))), (0,) * len(rows[0])

    return Asking


def filled(derivatives: Sequence[Any], like: Sequence[Any]) -> list[Any]:
    """Tangents with zeros in the place of None."""
    torch = library()
    return [torch.zeros_like(t) if d is None else d for d, t in zip(derivatives, like)]


def apart(ctx: Any, n: int) -> tuple[Any, Any, Any]:
    """What is kept: the number of the run, n inputs, and their tangents or cotangents."""
    run, *tensors = ctx.saved_tensors
    return run, tensors[:n], tensors[n:]


def varies(t: Any) -> bool:
    """Whether derivatives with respect to a tensor may be asked for."""
    torch = library()
    if t.requires_grad and torch.is_grad_enabled():
        return True
    return torch.autograd.forward_ad.unpack_dual(t).tangent is not None
