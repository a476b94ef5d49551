"""Memory that is used again: nobody's numbers are overwritten, and no more is held than there should be."""

import gc
import os
import threading
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import examples
from vmad_lit.core.valuetypes import nbytes_of
from vmad_lit.lib import memory

N = memory.LEAST // 8


@pytest.fixture(autouse=True)
def a_store_of_its_own():
    """Each test begins with nothing idle."""
    gc.collect()
    memory.release()
    yield
    memory.release()


@settings(max_examples=examples(60))
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.integers(0, 5)), max_size=30))
def test_no_array_sees_the_numbers_of_another(steps):
    """Arrays of several sizes are made, kept by views of them, and dropped, in any order."""
    held = []
    for number, (size, view, drop) in enumerate(steps):
        array = memory.empty((N + size, 2) if size % 2 else N + size, "f8" if size < 3 else "c16")
        array.fill(number)
        held.append((number, array[1:] if view else array))
        del array
        if drop < len(held):
            del held[drop]
        for expected, values in held:
            assert (values == expected).all()


@pytest.mark.parametrize(
    "shape, dtype",
    [
        (N, "f8"),
        ((3, N), "f4"),
        ((N, 2, 2), "c8"),
        ((2, N), "i8"),
        ((), "f8"),
        ((0, 5), "f8"),
        ((10,), "f4"),
        ((2 * N,), "u1"),
    ],
)
def test_like_numpy(shape, dtype):
    got, expected = memory.zeros(shape, dtype), np.zeros(shape, dtype)
    assert got.dtype == expected.dtype and got.shape == expected.shape and got.strides == expected.strides
    assert got.flags.writeable and got.flags.c_contiguous and got.flags.aligned
    assert (got == expected).all()


def test_used_again_when_the_last_view_is_gone():
    array = memory.empty((N, 2))
    where, view = array.ctypes.data, array.T[1:]
    del array
    assert memory.empty((N, 2)).ctypes.data != where
    del view
    assert memory.empty((2, N)).ctypes.data == where


def test_arrays_are_weighed_once():
    array = memory.empty((N, 2))
    assert nbytes_of([array, array.T, array], {}) == array.nbytes
    assert nbytes_of([array[1:], array], weakref.WeakValueDictionary()) == array.nbytes


def test_new_memory_takes_the_place_of_what_is_idle():
    """Whoever has gone through many small arrays, and goes on with large ones, does not carry the small ones along."""
    small = [memory.empty(N) for _ in range(100)]
    del small
    large = [memory.empty(10 * N) for _ in range(10)]
    held = sum(array.nbytes for array in large) + memory.release()
    assert held == 100 * N * 8
    del large
    assert memory.release() == 100 * N * 8


def test_arrays_of_a_rhythm_are_packed():
    """Arrays of several sizes that come and go alike in each round take no more room in the hundredth than in the first."""

    def a_round():
        waves = [memory.empty(N * (1 + i % 4)) for i in range(12)]
        del waves[::2]
        waves += [memory.empty(3 * N) for _ in range(4)]
        del waves[1::3]
        return memory.empty(5 * N)

    a_round()
    region = memory._store.idle[0][0]
    high = region.high
    for _ in range(100):
        a_round()
    assert region.high == high


@pytest.mark.parametrize("refuse", ["RLIMIT_AS", "overcommit", "sysconf", "the system"])
def test_without_addresses_to_spare(refuse, monkeypatch):
    """Where addresses are counted, each array has a region of its own, as long as there is none to share."""
    resource = pytest.importorskip("resource")
    if refuse == "RLIMIT_AS":
        monkeypatch.setattr(resource, "getrlimit", lambda which: (1 << 40, 1 << 40))
    elif refuse == "overcommit":
        monkeypatch.setattr(memory, "_accounts_for_addresses", lambda: True)
    elif refuse == "sysconf":
        monkeypatch.delattr(memory.os, "sysconf")
    else:
        monkeypatch.setattr(memory, "_affordable", lambda: 1 << 60)
    a, b = memory.zeros(N), memory.zeros(2 * N)
    where = b.ctypes.data
    del b
    c, d = memory.zeros(N), memory.zeros(N)
    assert sorted([c.ctypes.data, d.ctypes.data]) == [where, where + 8 * N]
    c.fill(3)
    assert not a.any() and not d.any()
    del c, d
    assert memory.release() == 16 * N


def test_regions_that_are_too_small_go_back(monkeypatch):
    """Where each array has a region of its own, those of small arrays are not held beside those of large ones."""
    monkeypatch.setattr(memory, "_affordable", lambda: 0)
    keep, small = memory.zeros(N), [memory.empty(N) for _ in range(10)]
    del small
    large = memory.empty(20 * N)
    assert memory.release() == 0
    del large
    assert memory.release() == 20 * N * 8 and not keep.any()


def test_the_system_says_when_there_is_no_memory(monkeypatch):
    monkeypatch.setattr(memory, "_affordable", lambda: 0)
    with pytest.raises(MemoryError, match="no 1152921504606846976 bytes"):
        memory.empty(1 << 60, "u1")


def test_whether_the_kernel_counts_addresses(tmp_path):
    (tmp_path / "setting").write_text("2\n")
    assert memory._accounts_for_addresses(tmp_path / "setting")
    (tmp_path / "setting").write_text("0\n")
    assert not memory._accounts_for_addresses(tmp_path / "setting")
    assert not memory._accounts_for_addresses(tmp_path / "missing")


def test_pages_that_were_given_back_are_new():
    keep, array = memory.empty(N), memory.empty(8 * N)
    keep.fill(7)
    array.fill(5)
    where = array.ctypes.data
    del array
    assert memory.release() == 64 * N
    again = memory.empty(8 * N)
    assert again.ctypes.data == where and (again[1024:-1024] == 0).all() and (keep == 7).all()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_that_forks_has_its_copies():
    array = memory.zeros(N)
    child = os.fork()
    if not child:
        array.fill(1)
        os._exit(0)
    os.waitpid(child, 0)
    assert not array.any()


def test_release_tells_how_much_it_was():
    array = memory.empty(N)
    assert memory.release() == 0
    del array
    assert memory.release() == 8 * N
    assert memory.release() == 0


def test_threads():
    """Arrays made and dropped by several threads at once are never shared."""
    wrong = []

    def work(number):
        for i in range(200):
            arrays = [memory.empty(N + i % 3) for _ in range(3)]
            for j, array in enumerate(arrays):
                array.fill(10 * number + j)
            wrong.extend(1 for j, array in enumerate(arrays) if not (array == 10 * number + j).all())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_fields_are_made_of_it():
    pytest.importorskip("pmesh")
    from pfft import LocalBuffer

    from vmad_lit.lib.fastpm import ParticleMesh

    if not hasattr(LocalBuffer, "allocate"):
        pytest.skip("the transforms have memory of their own")
    from mpi4py import MPI

    pm = ParticleMesh([48] * 3, BoxSize=1.0, comm=MPI.COMM_SELF)
    field = pm.create("real", value=1.0)
    where = field.value.ctypes.data
    value = field.value
    del field
    assert pm.create("real").value.ctypes.data != where and (value == 1.0).all()
    del value
    assert pm.create("complex").value.ctypes.data == where
