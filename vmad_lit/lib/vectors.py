"""Vectors in compiled loops: a few numbers that the processor loads, computes with, and stores as one.

A vector has two, four, eight or more lanes. Where there are three numbers, the fourth lane is idle.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vmad_lit.core.error import needed_for

with needed_for("compiled loops", extra="fast"):
    from llvmlite import ir
    from numba import float64, int64, types
    from numba.core import cgutils
    from numba import extending
    from numba.extending import models, register_model

intrinsic: Any = extending.intrinsic
INT, BIT = ir.IntType(32), ir.IntType(1)

#: What LLVM may do to sums and products: to fuse them.
FLAGS = ("contract",)


class Vector(types.Type):
    """The type of a vector, for numba: that of its lanes, and how many they are."""

    def __init__(self, dtype: Any, count: int) -> None:
        self.dtype, self.count = dtype, count
        super().__init__(f"vector({dtype} x {count})")


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    """What a vector is for LLVM."""

    def __init__(self, manager: Any, kind: Vector) -> None:
        element = manager.lookup(kind.dtype).get_value_type()
        super().__init__(manager, kind, ir.VectorType(element, kind.count))


def lanes(n: int) -> int:
    """How many lanes a vector of n numbers has."""
    return 1 << (n - 1).bit_length()


def _vector(dtype: Any, n: int) -> Any:
    """The type of n numbers; one is no vector."""
    return dtype if n == 1 else Vector(dtype, lanes(n))


def _dtype(kind: Any) -> Any:
    """The type of the lanes of a vector, of what a pointer or an array refers to, or of a number."""
    return getattr(kind, "dtype", kind)


def _constant(kind: Any, values: Sequence[Any]) -> Any:
    return ir.Constant(ir.VectorType(kind, len(values)), list(values))


def _splat(builder: Any, x: Any, n: int) -> Any:
    """A number in all lanes."""
    if n == 1:
        return x
    undefined = ir.Constant(ir.VectorType(x.type, n), ir.Undefined)
    return _shuffle(builder, builder.insert_element(undefined, x, INT(0)), None, [0] * n)


def _shuffle(builder: Any, a: Any, b: Any, which: Sequence[int]) -> Any:
    """The lanes `which` of two vectors, counted through both."""
    b = ir.Constant(a.type, ir.Undefined) if b is None else b
    return builder.shuffle_vector(a, b, _constant(INT, which))


def _widest(*kinds: Any) -> Any:
    return next((kind for kind in kinds if isinstance(kind, Vector)), kinds[0])


def _operands(
    context: Any, builder: Any, values: Sequence[Any], kinds: Sequence[Any], like: Any
) -> list[Any]:
    """Values as vectors like the widest of them; numbers are the same in all lanes."""
    return [
        value
        if isinstance(kind, Vector)
        else _splat(builder, context.cast(builder, value, kind, _dtype(like)), getattr(like, "count", 1))
        for value, kind in zip(values, kinds)
    ]


@intrinsic
def pointer(typing, array):
    """Where the numbers of an array begin."""

    def make(context, builder, signature, args):
        return context.make_array(array)(context, builder, args[0]).data

    return types.CPointer(array.dtype)(array), make


@intrinsic(prefer_literal=True)
def room(typing, like, count):
    """Memory for so many numbers, while the function runs."""
    dtype = _dtype(like)

    def make(context, builder, signature, args):
        kind = context.get_value_type(dtype)
        memory = cgutils.alloca_once(builder, ir.ArrayType(kind, count.literal_value))
        memory.align = 64
        return builder.bitcast(memory, kind.as_pointer())

    return types.CPointer(dtype)(like, count), make


def _place(builder: Any, base: Any, i: Any, n: int) -> Any:
    """The address of the number i from a pointer on, as that of n numbers."""
    place = builder.gep(base, [i])
    return place if n == 1 else builder.bitcast(place, ir.VectorType(place.type.pointee, n).as_pointer())


def _load_lanes(builder: Any, place: Any, mask: Any, others: Any, dtype: Any) -> Any:
    """The lanes of a vector in memory where the mask says so; no other memory is touched."""
    kind = others.type
    function = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(kind, [place.type, INT, mask.type, kind]),
        f"llvm.masked.load.v{kind.count}f{dtype.bitwidth}.p0",
    )
    return builder.call(function, [place, INT(dtype.bitwidth // 8), mask, others])


@intrinsic(prefer_literal=True)
def load(typing, base, i, count):
    """`count` numbers from the i-th one on."""
    n = count.literal_value
    w = lanes(n)

    def make(context, builder, signature, args):
        place = _place(builder, args[0], args[1], w)
        if w == n:
            return builder.load(place, align=base.dtype.bitwidth // 8)
        mask = _constant(BIT, [int(lane < n) for lane in range(w)])
        return _load_lanes(builder, place, mask, ir.Constant(place.type.pointee, None), base.dtype)

    return _vector(base.dtype, n)(base, i, count), make


@intrinsic(prefer_literal=True)
def load_some(typing, base, i, some, count):
    """The first `some` of `count` numbers from the i-th one on, and for the others one."""
    n = count.literal_value
    w = lanes(n)

    def make(context, builder, signature, args):
        place = _place(builder, args[0], args[1], w)
        limit = _splat(builder, context.cast(builder, args[2], some, int64), w)
        mask = builder.icmp_signed("<", _constant(ir.IntType(64), range(w)), limit)
        others = _constant(place.type.pointee.element, [float(lane < n) for lane in range(w)])
        return _load_lanes(builder, place, mask, others, base.dtype)

    return _vector(base.dtype, n)(base, i, some, count), make


@intrinsic(prefer_literal=True)
def store(typing, base, i, value, count):
    """Put `count` numbers to the i-th place and the next ones."""
    n = count.literal_value

    def make(context, builder, signature, args):
        x = args[2]
        if n > 1 and x.type.count != n:
            x = _shuffle(builder, x, None, range(n))
        builder.store(x, _place(builder, args[0], args[1], n), align=base.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(base, i, value, count), make


@intrinsic
def convert(typing, value, like):
    """A number or a vector of floating point numbers, in the precision of another, or of an array."""
    before, after = _dtype(value), _dtype(like)

    def make(context, builder, signature, args):
        if before == after:
            return args[0]
        kind = context.get_value_type(signature.return_type)
        change = builder.fpext if after.bitwidth > before.bitwidth else builder.fptrunc
        return change(args[0], kind)

    return (Vector(after, value.count) if isinstance(value, Vector) else after)(value, like), make


def _arithmetic(name: str, integer: bool = False) -> Any:
    @intrinsic
    def operation(typing, a, b):
        like = _widest(a, b)

        def make(context, builder, signature, args):
            flags = () if integer else FLAGS
            return getattr(builder, name)(
                *_operands(context, builder, args, signature.args, like), flags=flags
            )

        return like(a, b), make

    return operation


add, subtract, multiply = map(_arithmetic, ("fadd", "fsub", "fmul"))
add_integers = _arithmetic("add", integer=True)


@intrinsic
def multiply_add(typing, a, b, c):
    """a * b + c"""
    like = _widest(a, b, c)

    def make(context, builder, signature, args):
        x, y, z = _operands(context, builder, args, signature.args, like)
        return builder.fadd(builder.fmul(x, y, flags=FLAGS), z, flags=FLAGS)

    return like(a, b, c), make


@intrinsic
def between(typing, a, b, u):
    """a + u * (b - a)"""

    def make(context, builder, signature, args):
        x, y, z = _operands(context, builder, args, signature.args, a)
        return builder.fadd(builder.fmul(builder.fsub(y, x, flags=FLAGS), z, flags=FLAGS), x, flags=FLAGS)

    return a(a, b, u), make


@intrinsic
def floors(typing, a):
    """The whole numbers below."""

    def make(context, builder, signature, args):
        kind = args[0].type
        name = f"llvm.floor.v{kind.count}f{a.dtype.bitwidth}"
        return builder.call(
            cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind]), name), args
        )

    return a(a), make


@intrinsic(prefer_literal=True)
def part(typing, a, first, count):
    """`count` lanes from `first` on."""
    begin, n = first.literal_value, count.literal_value

    def make(context, builder, signature, args):
        if n == 1:
            return builder.extract_element(args[0], INT(begin))
        return _shuffle(builder, args[0], None, [min(begin + k, a.count - 1) for k in range(lanes(n))])

    return _vector(a.dtype, n)(a, first, count), make


@intrinsic(prefer_literal=True)
def join(typing, a, b, count):
    """The first `count` lanes of one, and after them those of the other."""
    n = count.literal_value

    def make(context, builder, signature, args):
        x, y = args[:2]
        if n == 1:
            pair = ir.Constant(ir.VectorType(x.type, 2), ir.Undefined)
            return builder.insert_element(builder.insert_element(pair, x, INT(0)), y, INT(1))
        which = [k if k < n else lanes(n) + min(k, 2 * n - 1) - n for k in range(lanes(2 * n))]
        return _shuffle(builder, x, y, which)

    return Vector(_dtype(a), lanes(2 * n))(a, b, count), make


@intrinsic
def pack(typing, numbers):
    """A tuple of numbers as a vector."""
    n = numbers.count

    def make(context, builder, signature, args):
        vector = ir.Constant(context.get_value_type(signature.return_type), None)
        for k in range(n):
            vector = builder.insert_element(vector, builder.extract_value(args[0], k), INT(k))
        return vector

    return Vector(numbers.dtype, lanes(n))(numbers), make


@intrinsic
def sums(typing, a, b, c):
    """The sums of the lanes of three vectors of four."""

    def make(context, builder, signature, args):
        x, y, z = args
        s = builder.fadd(
            _shuffle(builder, x, y, [0, 4, 1, 5]), _shuffle(builder, x, y, [2, 6, 3, 7]), flags=FLAGS
        )
        t = builder.fadd(z, _shuffle(builder, z, None, [2, 3, 2, 3]), flags=FLAGS)
        first, last = ([0, 1, 4, 4], [2, 3, 5, 5])
        return builder.fadd(_shuffle(builder, s, t, first), _shuffle(builder, s, t, last), flags=FLAGS)

    return a(a, b, c), make


@intrinsic
def choose(typing, condition, a, b):
    """One of two, by a condition for all lanes."""
    like = _widest(a, b)

    def make(context, builder, signature, args):
        return builder.select(args[0], *_operands(context, builder, args[1:], signature.args[1:], like))

    return like(condition, a, b), make


@intrinsic
def columns(typing, a, b, c):
    """The three columns of rows of three numbers that lie in three vectors, one after the other."""
    n = a.count

    def make(context, builder, signature, args):
        x, y, z = args
        front = _shuffle(builder, x, y, range(2 * n))
        rear = _shuffle(builder, z, None, [min(k, n - 1) for k in range(2 * n)])
        found = [_shuffle(builder, front, rear, [3 * k + axis for k in range(n)]) for axis in range(3)]
        return context.make_tuple(builder, signature.return_type, found)

    return types.UniTuple(a, 3)(a, b, c), make


@intrinsic
def fold(typing, a, period):
    """Whole numbers folded into 0 to `period`, if they are not more than one period away."""

    def make(context, builder, signature, args):
        x, n = _operands(context, builder, args, signature.args, a)
        zero = ir.Constant(x.type, None)
        x = builder.fadd(x, builder.select(builder.fcmp_ordered("<", x, zero), n, zero))
        return builder.fsub(x, builder.select(builder.fcmp_ordered(">=", x, n), n, zero))

    return a(a, period), make


@intrinsic
def follow(typing, a, period):
    """The next whole numbers, with 0 after the last one of a period."""

    def make(context, builder, signature, args):
        x, n = _operands(context, builder, args, signature.args, a)
        following = builder.fadd(x, _constant(x.type.element, [1.0] * a.count))
        return builder.select(builder.fcmp_ordered("<", following, n), following, ir.Constant(x.type, None))

    return a(a, period), make


def _is_within(builder: Any, x: Any, low: Any, high: Any) -> Any:
    return builder.and_(builder.fcmp_ordered(">=", x, low), builder.fcmp_ordered("<", x, high))


@intrinsic
def all_within(typing, a, period):
    """Whether all lanes are numbers from 0 to below `period`."""

    def make(context, builder, signature, args):
        x, n = _operands(context, builder, args, signature.args, a)
        bits = builder.bitcast(_is_within(builder, x, ir.Constant(x.type, None), n), ir.IntType(a.count))
        return builder.icmp_unsigned("==", bits, ir.Constant(bits.type, (1 << a.count) - 1))

    return types.boolean(a, period), make


@intrinsic
def times_stride(typing, a, stride):
    """Small whole numbers times an integer, both below 2^31, as integers."""

    def make(context, builder, signature, args):
        wide = ir.VectorType(ir.IntType(64), a.count)
        cells = builder.sext(builder.fptosi(args[0], ir.VectorType(INT, a.count)), wide)
        step = builder.sext(builder.trunc(args[1], INT), ir.IntType(64))
        return builder.mul(cells, _splat(builder, step, a.count))

    return Vector(int64, a.count)(a, stride), make


@intrinsic
def where_within(typing, a, low, high, value):
    """Lanes of `value` where those of `a` are from `low` to below `high`; others are -1."""

    def make(context, builder, signature, args):
        x, begin, end = _operands(context, builder, args[:3], (a, float64, float64), a)
        inside = _is_within(builder, x, begin, end)
        return builder.select(inside, args[3], ir.Constant(args[3].type, [-1] * a.count))

    return value(a, low, high, value), make
