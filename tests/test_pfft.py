"""The distributed Fourier transform against NumPy's, in every combination, on any number of ranks."""

import itertools

import numpy
import pytest

pytest.importorskip("mpi4py")
from helpers import examples

pfft = pytest.importorskip("pfft")
if "ducc0" not in getattr(pfft, "__version__", ""):
    pytest.skip("the site's own pfft is installed, not the book's", allow_module_level=True)

from hypothesis import given, settings, strategies as st  # noqa: E402
from mpi4py import MPI  # noqa: E402

from pfft.partition import ALL_FLAGS, block_edges  # noqa: E402
from pfft.plan import itinerary  # noqa: E402
from pfft import Direction, Flags, LocalBuffer, Partition, Plan, ProcMesh, Type  # noqa: E402

WORLD = MPI.COMM_WORLD
P = WORLD.size


def meshes(ndim):
    """Shapes of process meshes that cut data of `ndim` axes."""
    found = [[]] if P == 1 else []
    if ndim > 1 or P == 1:
        found.append([P])
    if ndim >= 2:
        found += [list(pfft.split_size_2d(P)), [1, P], [P, 1]]
    if ndim >= 3:
        found += [[*pfft.split_size_2d(P), 1], [1, *pfft.split_size_2d(P)]]
    return [list(np) for np in dict.fromkeys(map(tuple, found))]


def transform(x, kind, direction):
    """The unnormalised transform of a whole array by NumPy."""
    if kind.kind == "r2c":
        return numpy.fft.rfftn(x) if direction < 0 else numpy.fft.rfftn(x).conj()
    if kind.kind == "c2c":
        return numpy.fft.fftn(x) if direction < 0 else numpy.fft.ifftn(x) * x.size
    raise ValueError(kind)


def sample(shape, dtype, seed=0):
    rng = numpy.random.default_rng(seed)
    x = rng.standard_normal(shape)
    return (x + 1j * rng.standard_normal(shape) if dtype.kind == "c" else x).astype(dtype)


def everywhere(ok, *message):
    """Assert on all ranks what all ranks see, so that none goes on alone."""
    seen = WORLD.allgather(bool(ok))
    assert all(seen), (*message, f"wrong on ranks {[r for r, s in enumerate(seen) if not s]}")


def tolerance(kind):
    return dict(rtol=1e-4, atol=1e-3) if kind >= 4 else dict(rtol=1e-11, atol=1e-10)


SHAPES = [(5,), (8,), (7, 5), (2, 8), (8, 6), (7, 5, 3), (2, 2, 2), (1, 3, 4), (8, 4, 6), (3, 2, 4, 5)]
CASES = [(kind, shape) for kind in (Type.R2C, Type.C2C) for shape in SHAPES]
CASES += [(kind, shape) for kind in (Type.R2CF, Type.C2CF) for shape in SHAPES[::3]]


@pytest.mark.collective
@pytest.mark.parametrize("kind, shape", CASES, ids=lambda value: getattr(value, "name", str(value)))
def test_there_and_back(kind, shape):
    if len(shape) == 1 and P > 1:
        pytest.skip("one-dimensional transforms run on one rank")
    for np, transposed, padded, inplace in itertools.product(meshes(len(shape)), (0, 1), (0, 1), (0, 1)):
        if padded and len(np) == len(shape):
            continue
        flags = Flags.TRANSPOSED_OUT * transposed | (Flags.PADDED_R2C | Flags.PADDED_C2R) * padded
        partition = Partition(kind, shape, ProcMesh(np, WORLD), flags)
        a = LocalBuffer(partition)
        b = a if inplace else LocalBuffer(partition)
        forward = Plan(partition, Direction.FORWARD, a, b)
        backward = Plan(partition, Direction.BACKWARD, b, a)
        x = sample(shape, partition.i_dtype)
        a.view_input()[...] = x[partition.local_i_slice]
        forward.execute(a, b)
        case = np, flags, inplace, forward, backward
        truth = transform(x, kind, -1)[partition.local_o_slice]
        everywhere(numpy.allclose(b.view_output(), truth, **tolerance(kind)), *case)
        if not inplace:
            everywhere((a.view_input() == x[partition.local_i_slice]).all(), "input not preserved", *case)
        backward.execute(b, a)
        expected = (x * x.size)[partition.local_i_slice]
        everywhere(numpy.allclose(a.view_input(), expected, **tolerance(kind)), *case)
        if not inplace:
            kept = numpy.allclose(b.view_output(), truth, **tolerance(kind))
            everywhere(kept, "input not preserved", *case)


@pytest.mark.collective
@pytest.mark.parametrize("shape", [(7, 5), (5, 4, 6), (3, 2, 4, 5)], ids=str)
@pytest.mark.parametrize(
    "flags",
    [0, Flags.TRANSPOSED_IN, Flags.TRANSPOSED_OUT, Flags.TRANSPOSED_IN | Flags.TRANSPOSED_OUT],
    ids=repr,
)
def test_any_ends_of_any_kind(shape, flags):
    """Also the unusual ones: real arrays in the transposed layout, a forward c2r, a backward r2c."""
    for kind, direction, np, inplace in itertools.product(
        (Type.R2C, Type.C2R, Type.C2C), Direction, meshes(len(shape)), (False, True)
    ):
        partition = Partition(kind, shape, ProcMesh(np, WORLD), flags)
        a = LocalBuffer(partition)
        b = a if inplace else LocalBuffer(partition)
        plan = Plan(partition, direction, a, b, type=kind, flags=flags)
        if kind == Type.C2R:
            y = sample(shape, numpy.dtype("f8"))
            x = transform(y, Type.R2C, -direction)
            truth = y * y.size
        else:
            x = sample(shape, partition.i_dtype)
            truth = transform(x, kind, direction)
        a.view_input()[...] = x[partition.local_i_slice]
        plan.execute(a, b)
        everywhere(numpy.allclose(b.view_output(), truth[partition.local_o_slice]), np, plan)
        largest = max(step.nbytes for step in plan._steps)
        room = partition.alloc_local * partition.type.numbers[1].itemsize
        everywhere(largest <= room, "a stage does not fit the buffers", np, plan)


@pytest.mark.collective
@settings(max_examples=examples(25))
@given(shape=st.lists(st.integers(1, 9), min_size=2, max_size=3).map(tuple), data=st.data())
def test_the_blocks_tile_the_mesh(shape, data):
    np = data.draw(st.sampled_from(meshes(len(shape))))
    flags = data.draw(st.sampled_from([0, Flags.TRANSPOSED_OUT, Flags.TRANSPOSED_IN]))
    kind = data.draw(st.sampled_from([Type.R2C, Type.C2R, Type.C2C]))
    p = Partition(kind, shape, ProcMesh(np, WORLD), flags)
    for whole, cut, start, edges in [
        (p.ni, p.local_i_slice, p.local_i_start, p.i_edges),
        (p.no, p.local_o_slice, p.local_o_start, p.o_edges),
    ]:
        count = numpy.zeros(whole, dtype="i8")
        count[cut] = 1
        assert (WORLD.allreduce(count) == 1).all()
        assert all(s in e for s, e in zip(start, edges))
        assert all((numpy.diff(e) >= 0).all() and e[0] == 0 and e[-1] == n for e, n in zip(edges, whole))
        assert len(set(WORLD.allgather(str(edges)))) == 1


@given(n=st.integers(1, 50), parts=st.integers(1, 60))
def test_blocks_are_those_of_fftw(n, parts):
    size = numpy.diff(block_edges(n, parts))
    block = -(-n // parts)
    assert size.sum() == n and (size[: n // block] == block).all() and (size[-(-n // block) :] == 0).all()


@pytest.mark.collective
def test_adjoint():
    """<A, R x> = <C A, x> in the inner product that counts modes without a stored partner twice."""
    shape = (5, 4, 6)
    partition = Partition(Type.R2C, shape, ProcMesh(pfft.split_size_2d(P), WORLD), Flags.TRANSPOSED_OUT)
    a, b = LocalBuffer(partition), LocalBuffer(partition)
    forward, backward = Plan(partition, Direction.FORWARD, a, b), Plan(partition, Direction.BACKWARD, b, a)
    x, A = sample(shape, numpy.dtype("f8")), sample((5, 4, 4), numpy.dtype("c16"), seed=1)
    weight = numpy.array([1, 2, 2, 1])[partition.local_o_slice[2]]
    a.view_input()[...] = x[partition.local_i_slice]
    forward.execute(a, b)
    here = A[partition.local_o_slice]
    left = WORLD.allreduce((weight * here.conj() * b.view_output()).real.sum())
    b.view_output()[...] = here
    backward.execute(b, a)
    right = WORLD.allreduce((x[partition.local_i_slice] * a.view_input()).sum())
    numpy.testing.assert_allclose(left, right)


# -- The interface: what is documented of the PFFT binding -------------------------------------------------


@pytest.mark.parametrize(
    "size, factors",
    [
        (1, (1, 1)),
        (2, (2, 1)),
        (3, (1, 3)),
        (4, (2, 2)),
        (6, (3, 2)),
        (7, (1, 7)),
        (12, (4, 3)),
        (16, (4, 4)),
        (64, (8, 8)),
    ],
)
def test_split_size_2d(size, factors):
    assert pfft.split_size_2d(size) == factors


@pytest.mark.parametrize(
    "np, n, flags, i_strides, o_strides",
    [
        ([1], (4, 8), Flags.TRANSPOSED_OUT, (128, 16), (16, 64)),
        ([1], (1, 2, 3, 4), Flags.TRANSPOSED_OUT, (384, 192, 64, 16), (192, 192, 64, 16)),
        ([1, 1], (1, 2, 3, 4), Flags.TRANSPOSED_OUT, (384, 192, 64, 16), (64, 192, 64, 16)),
        ([1, 1], (2, 3, 4), Flags.TRANSPOSED_OUT, (192, 64, 16), (16, 128, 32)),
        ([1, 1], (2, 3, 4), Flags.TRANSPOSED_NONE, (192, 64, 16), (192, 64, 16)),
    ],
)
def test_strides(np, n, flags, i_strides, o_strides):
    buffer = LocalBuffer(Partition(Type.C2C, n, ProcMesh(np, MPI.COMM_SELF), flags))
    assert buffer.view_input().strides == i_strides
    assert buffer.view_output().strides == o_strides


def test_padding():
    flags = Flags.TRANSPOSED_OUT | Flags.PADDED_R2C
    partition = Partition(Type.R2C, [4, 8], ProcMesh([1], MPI.COMM_SELF), flags)
    buffer = LocalBuffer(partition)
    assert buffer.view_input().shape == (4, 8) and buffer.view_input().strides == (80, 8)
    assert buffer.view_output().shape == (4, 5) and buffer.view_output().strides == (16, 64)
    assert partition.local_ni.tolist() == [4, 10] and partition.ni.tolist() == [4, 8]
    assert buffer.view_raw().size == 2 * partition.alloc_local


def test_buffers_share_memory():
    mesh = ProcMesh([1], MPI.COMM_SELF)
    turned, plain = (Partition(Type.R2C, [8, 8], mesh, flags) for flags in (Flags.TRANSPOSED_OUT, 0))
    first, other = LocalBuffer(turned), LocalBuffer(turned)
    second = LocalBuffer(plain, base=first)
    assert first in second and second in first and first not in other
    assert first.view_input().base is first
    first.view_input()[...] = 3
    assert (second.view_input() == 3).all()
    assert first.address % 64 == 0


def test_enumerations():
    assert Type.PFFT_R2C.inverse == Type.C2R and Type.PFFTF_C2R.inverse == Type.PFFTF_R2C
    assert Type.C2C.is_inverse_of(Type.C2C) and not Type.R2C.is_inverse_of(Type.R2C)
    assert Flags.PFFT_TRANSPOSED_OUT | Flags.PFFT_MEASURE == Flags.TRANSPOSED_OUT
    assert (Direction.PFFT_FORWARD, Direction.PFFT_BACKWARD) == (-1, 1)


@pytest.mark.collective
def test_a_backward_plan_turns_round():
    partition = Partition(Type.R2C, [4, 4], ProcMesh([P], WORLD), Flags.ESTIMATE | Flags.TRANSPOSED_OUT)
    a, b = LocalBuffer(partition), LocalBuffer(partition)
    plan = Plan(partition, Direction.BACKWARD, b, a)
    assert plan.type == Type.C2R and plan.flags == Flags.ESTIMATE | Flags.TRANSPOSED_IN and not plan.inplace
    assert Plan(partition, Direction.FORWARD, a).inplace
    turned = Partition(Type.C2C, [4, 4], ProcMesh([P], WORLD), Flags.TRANSPOSED_IN)
    c = LocalBuffer(turned)
    assert Plan(turned, Direction.FORWARD, c).flags == Flags.TRANSPOSED_IN
    assert Plan(turned, Direction.BACKWARD, c).flags == Flags.TRANSPOSED_OUT


@pytest.mark.parametrize("kind", ["r2c", "c2r", "c2c"])
@pytest.mark.parametrize("np", [[2], [2, 3]])
def test_no_detours(kind, np):
    """A transform from one end to the other needs one exchange a direction, one that comes back needs two."""
    m = len(np)
    ways = {"r2c": [(m, 0)], "c2r": [(0, m)], "c2c": [(m, 0), (0, m)]}[kind]
    for start, stop in itertools.product((0, m), repeat=2):
        steps = itinerary(kind, 3, np, start, stop)
        least = m if (start, stop) in ways else 3 * m if kind != "c2c" and start != stop else 2 * m
        assert [step[0] for step in steps].count("exchange") == least
        axes = [axis for step in steps if step[0] == "transform" for axis in step[1]]
        assert sorted(axes) == [0, 1, 2]


def test_threads():
    before = pfft.get_num_threads()
    try:
        pfft.set_num_threads(2)
        assert pfft.get_num_threads() == 2
        with pytest.raises(ValueError, match="at least 1"):
            pfft.set_num_threads(0)
    finally:
        pfft.set_num_threads(before)


# -- Communicators -----------------------------------------------------------------------------------------


@pytest.mark.collective
def test_communicators_are_few_and_go_with_their_parent():
    """Far more process meshes than MPI has communicators; and parents that come and go."""
    for _ in range(3000):
        ProcMesh(pfft.split_size_2d(P), WORLD)
    for _ in range(20):
        comm = WORLD.Dup()
        ProcMesh(pfft.split_size_2d(P), comm)
        ProcMesh([P], comm)
        comm.Free()


@pytest.mark.collective
def test_a_part_of_the_world():
    comm = WORLD.Split(WORLD.rank % 2, WORLD.rank)
    partition = Partition(Type.C2C, (4, 3), ProcMesh([comm.size], comm), Flags.TRANSPOSED_OUT)
    a, b = LocalBuffer(partition), LocalBuffer(partition)
    x = sample((4, 3), numpy.dtype("c16"), seed=WORLD.rank % 2)
    a.view_input()[...] = x[partition.local_i_slice]
    Plan(partition, Direction.FORWARD, a, b).execute(a, b)
    everywhere(numpy.allclose(b.view_output(), numpy.fft.fftn(x)[partition.local_o_slice]))
    comm.Free()


# -- Bad input ---------------------------------------------------------------------------------------------


@pytest.mark.collective
def test_bad_meshes():
    with pytest.raises(ValueError, match=rf"needs {P + 1} ranks.* has {P}"):
        ProcMesh([P + 1], WORLD)
    with pytest.raises(ValueError, match="1 or 2"):
        ProcMesh.split(3)
    with pytest.raises(ValueError, match="at least 1"):
        pfft.split_size_2d(0)
    mesh = ProcMesh([P, 1, 1], WORLD)
    with pytest.raises(ValueError, match="3 directions cannot cut a mesh of 2 axes"):
        Partition(Type.R2C, [4, 4], mesh)
    for bad in ([], [4, 0, 4, 4]):
        with pytest.raises(ValueError, match="at least one axis and one point"):
            Partition(Type.R2C, bad, mesh)


@pytest.mark.collective
def test_bad_flags_and_types():
    mesh = ProcMesh([P], WORLD)
    with pytest.raises(ValueError, match="unknown flags 0x40000000"):
        Partition(Type.R2C, [4, 4], mesh, 1 << 30 | Flags.ESTIMATE)
    with pytest.raises(ValueError, match="99 is not a valid Type"):
        Partition(99, [4, 4], mesh)
    with pytest.raises(NotImplementedError, match="R2R"):
        Partition(Type.R2R, [4, 4], mesh)
    with pytest.raises(NotImplementedError, match="SHIFTED"):
        Partition(Type.C2C, [4, 4], mesh, Flags.SHIFTED_OUT)
    with pytest.raises(NotImplementedError, match="PFFT_PADDED_R2C|PADDED_R2C"):
        Partition(Type.R2C, [4, 4], mesh, Flags.TRANSPOSED_IN | Flags.PADDED_R2C)
    if P > 1:
        with pytest.raises(NotImplementedError, match="one rank only"):
            Partition(Type.R2C, [4], mesh)
    assert Partition(
        Type.R2C,
        [4, 4],
        mesh,
        ALL_FLAGS & ~Flags.SHIFTED_IN & ~Flags.SHIFTED_OUT & ~Flags.PADDED_R2C & ~Flags.PADDED_C2R,
    )


@pytest.mark.collective
def test_bad_buffers():
    mesh = ProcMesh([P], WORLD)
    partition, larger = Partition(Type.R2C, [4, 4], mesh), Partition(Type.R2C, [40, 40], mesh)
    single = Partition(Type.R2CF, [4, 4], mesh)
    a, b, c, s = (LocalBuffer(p) for p in (partition, partition, larger, single))
    with pytest.raises(ValueError, match=r"bytes.*n=\[40, 40\]"):
        LocalBuffer(larger, base=a)
    with pytest.raises(TypeError, match="ndarray"):
        LocalBuffer(partition, base=a.view_raw())
    with pytest.raises(TypeError, match="expected a LocalBuffer, not ndarray"):
        Plan(partition, Direction.FORWARD, a.view_input())
    with pytest.raises(TypeError, match="precisions"):
        Plan(partition, Direction.FORWARD, a, type=Type.R2CF)
    plan = Plan(partition, Direction.FORWARD, a, b)
    for wrong in (c, s):
        with pytest.raises(ValueError, match="the buffer is for"):
            plan.execute(a, wrong)
    with pytest.raises(ValueError, match="out of place"):
        plan.execute(a)
    with pytest.raises(ValueError, match="in place"):
        Plan(partition, Direction.FORWARD, a).execute(a, b)
