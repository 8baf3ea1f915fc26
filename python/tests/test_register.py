"""What can be registered, and what is refused by name."""

import array
import ctypes
import gc
import mmap
import os
import sys
import weakref

import numpy as np
import pytest

import dmabuf_rdma as rdma
from conftest import Pair, filled


def crosses(pair, region, expected):
    """Whether the bytes of a region on the near side arrive at the far side."""
    theirs = np.zeros(region.nbytes, np.uint8)
    far = pair.far_domain.register(theirs, rdma.Access.REMOTE)
    assert pair.near.write(region, far.remote()).wait(timeout=30) == region.nbytes
    assert theirs.tobytes() == expected


@pytest.mark.parametrize("dtype", ["u1", "<f4", ">i8", "c16", "bool", "datetime64[s]", "U5", "V3", "f2"])
def test_numpy_of_every_type(pair, dtype):
    ours = filled(np.dtype(dtype).itemsize * 24).view(dtype).reshape(4, 6)
    crosses(pair, pair.near_domain.register(ours), ours.tobytes())


def test_what_has_the_buffer_protocol(pair):
    data = filled(5000).tobytes()
    pages = mmap.mmap(-1, 8192)
    pages[:5000] = data
    for memory in [bytearray(data), memoryview(data)[10:4000], array.array("B", data), data]:
        crosses(pair, pair.near_domain.register(memory), bytes(memory))
    region = pair.near_domain.register(pages, rdma.Access.REMOTE)
    crosses(pair, region, bytes(pages))
    del region
    gc.collect()
    pages.close()
    of_ctypes = (ctypes.c_uint32 * 100)(*range(100))
    crosses(pair, pair.near_domain.register(of_ctypes), bytes(of_ctypes))


def jax_arrays():
    """In a process of its own that conftest starts early, because the import alone takes 10 s in an emulated guest."""
    import jax.numpy as jnp

    pair = Pair()
    for dtype in [jnp.float32, jnp.bfloat16, jnp.int8, jnp.bool_]:
        ours = (jnp.arange(3000) % 100).astype(dtype).reshape(30, 100)
        crosses(pair, pair.near_domain.register(ours), np.asarray(ours).tobytes())
    with pytest.raises(rdma.MisuseError, match="no bytes"):
        pair.near_domain.register(jnp.zeros((0, 3)))
    # The region holds the buffer, also if JAX is told to delete the array.
    ours = jnp.arange(5000) * 3
    expected = np.asarray(ours).tobytes()
    region = pair.near_domain.register(ours)
    ours.delete()
    del ours
    gc.collect()
    others = [jnp.full(5000, at) for at in range(20)]
    crosses(pair, region, expected)
    # Indices of JAX.
    table = region.strided(4, 4, 5000).select(jnp.array([7, 0]))
    assert [table[0], table[1]] == [(28, 4), (0, 4)] and len(others) == 20


def test_jax_arrays(jax_process):
    jax_process()


class Lender:
    """Lends numpy's tensor through DLPack only."""

    def __init__(self, held, **refuse):
        self.held = held
        self.old = refuse.get("old", False)

    def __dlpack_device__(self):
        return self.held.__dlpack_device__()

    def __dlpack__(self, **options):
        if self.old and options:
            raise TypeError("no such options")
        return self.held.__dlpack__(**options)


@pytest.mark.parametrize("old", [False, True])
def test_dlpack_of_either_version(pair, old):
    ours = filled(4096).view(np.float64)
    lender = Lender(ours, old=old)
    crosses(pair, pair.near_domain.register(lender, rdma.Access.REMOTE), ours.tobytes())
    with pytest.raises(rdma.MisuseError, match="not contiguous"):
        pair.near_domain.register(Lender(ours[::2], old=old))


def test_every_order_of_dense_dimensions(pair):
    ours = filled(2 * 3 * 4 * 8).view(np.float64).reshape(2, 3, 4)
    for view in [ours, ours.T, np.asfortranarray(ours), ours[::-1], ours.transpose(1, 0, 2), ours[:, :, ::-1]]:
        region = pair.near_domain.register(view)
        assert region.nbytes == view.nbytes
        # The bytes are those of the memory, whatever the order.
        whole = view.base if view.base is not None else view
        crosses(pair, region, whole.ravel(order="K").tobytes())


def test_views_with_gaps_are_refused_or_become_blocks(pair):
    ours = filled(64 * 100).reshape(64, 100)
    region = pair.near_domain.register(ours)
    for view in [ours[:, 10:20], ours[::2], ours[5:9, ::3], ours[::-1, 50:60], ours[:, 10:20].T]:
        with pytest.raises(rdma.MisuseError, match=r"not contiguous.*shape.*strides.*blocks_of"):
            pair.near_domain.register(view)
        table = region.blocks_of(view)
        assert table.nbytes == view.nbytes
        theirs = np.zeros(view.nbytes, np.uint8)
        far = pair.far_domain.register(theirs, rdma.Access.REMOTE)
        length = table[0][1]
        pair.near.write(table, far.remote().strided(length, length, len(table))).wait(timeout=30)
        assert theirs.tobytes() == view.tobytes()
    broadcast = np.broadcast_to(ours[:1], (4, 100))
    with pytest.raises(rdma.MisuseError, match="not contiguous"):
        pair.near_domain.register(broadcast)
    assert len(region.blocks_of(broadcast)) == 4
    assert list(region.blocks_of(ours[3])) == [(300, 100)]
    with pytest.raises(rdma.MisuseError, match="not inside the 6400 bytes"):
        region.blocks_of(np.zeros(8))
    with pytest.raises(rdma.MisuseError, match="no bytes"):
        region.blocks_of(ours[:0])


def test_overlaps(pair):
    """Regions may overlap, and so may the blocks of a source."""
    ours = filled(1000)
    whole, part = pair.near_domain.register(ours), pair.near_domain.register(ours[100:200])
    crosses(pair, part, ours[100:200].tobytes())
    theirs = np.zeros(200, np.uint8)
    far = pair.far_domain.register(theirs, rdma.Access.REMOTE)
    table = whole.blocks(100, [50, 100])
    pair.near.write(table, far.remote().strided(100, 100, 2)).wait(timeout=30)
    assert theirs.tobytes() == ours[50:150].tobytes() + ours[100:200].tobytes()


def test_wrong_objects_are_refused_by_name(domain):
    for wrong in [None, 7, "text", object(), [1, 2], 3.5, {}]:
        with pytest.raises(TypeError, match="is no memory"):
            domain.register(wrong)
    with pytest.raises(rdma.MisuseError, match="Python objects"):
        domain.register(np.array([object()]))
    with pytest.raises(rdma.MisuseError, match=r"shape \[0, 3\] and no bytes"):
        domain.register(np.zeros((0, 3)))
    with pytest.raises(rdma.MisuseError, match="no bytes"):
        domain.register(b"")
    with pytest.raises(TypeError, match="Access"):
        domain.register(np.zeros(8), "remote")
    with pytest.raises(rdma.MisuseError, match="LOCAL_WRITE"):
        domain.register(np.zeros(8), rdma.Access.REMOTE_WRITE)
    with pytest.raises(rdma.MisuseError):
        domain.register(np.zeros(8), 1 << 6)


def test_read_only_memory_is_a_source_only(pair):
    ours = filled(512)
    frozen = ours.copy()
    frozen.flags.writeable = False
    for memory in [frozen, ours.tobytes(), Lender(frozen)]:
        crosses(pair, pair.near_domain.register(memory, rdma.Access.REMOTE_READ), ours.tobytes())
        for access in [rdma.Access.LOCAL_WRITE, rdma.Access.REMOTE]:
            with pytest.raises(rdma.AccessError, match="read-only") as refused:
                pair.near_domain.register(memory, access)
            assert isinstance(refused.value, PermissionError) and refused.value.kind == "Permission"


def test_pointers_are_said_to_be_unsafe(pair):
    ours = filled(300)
    with pytest.raises(rdma.MisuseError, match="unsafe=True"):
        pair.near_domain.register((ours.ctypes.data, 300))
    crosses(pair, pair.near_domain.register((ours.ctypes.data, 300), unsafe=True), ours.tobytes())
    with pytest.raises(rdma.MisuseError):
        pair.near_domain.register((ours.ctypes.data, 0), unsafe=True)
    with pytest.raises(rdma.MisuseError, match="null"):
        pair.near_domain.register((0, 300), unsafe=True)
    with pytest.raises(TypeError, match=r"\(pointer, nbytes\)"):
        pair.near_domain.register((-1, 300), unsafe=True)


def test_a_region_holds_the_array(pair):
    ours = filled(4096)
    expected, base = ours.tobytes(), sys.getrefcount(ours)
    region = pair.near_domain.register(ours)
    part, table = region[100:200], region.strided(8, 8, 4)
    assert sys.getrefcount(ours) == base + 1
    gone = weakref.ref(ours)
    del ours
    gc.collect()
    assert gone() is not None
    crosses(pair, region, expected)
    del region
    assert gone() is not None
    del part
    assert gone() is not None
    del table
    gc.collect()
    assert gone() is None


def test_a_transfer_holds_the_array(pair):
    ours, near, theirs, far = pair.memory(8 << 20)
    ours[:] = filled(8 << 20)
    expected = ours.tobytes()
    gone = weakref.ref(ours)
    transfer = pair.near.write(near, far.remote())
    del ours, near
    gc.collect()
    assert gone() is not None
    transfer.wait(timeout=60)
    assert theirs.tobytes() == expected
    # The handles of the memory go with the job.
    del transfer
    gc.collect()
    assert gone() is None


def test_memory_cannot_be_freed_or_resized_while_it_is_registered(domain):
    data, pages, numbers, ours = bytearray(100), mmap.mmap(-1, 4096), array.array("i", [1]), np.zeros(100)
    regions = [domain.register(memory) for memory in [data, pages, numbers, ours]]
    for change in [lambda: data.extend(b"x"), pages.close, lambda: numbers.append(2)]:
        with pytest.raises(BufferError):
            change()
    with pytest.raises(ValueError, match="resize"):
        ours.resize(1 << 20)
    del regions
    gc.collect()
    data.extend(b"x")
    pages.close()
    numbers.append(2)


def test_a_scalar_of_numpy_holds_its_copy(pair):
    _, _, theirs, far = pair.memory(64)
    # The array of which the scalar's interface tells is a temporary one.
    region = pair.near_domain.register(np.arange(3, dtype=np.uint64)[2])
    others = [np.full((), 77, np.uint64) for _ in range(1000)]
    pair.near.write(region, far.remote()[:8]).wait(timeout=30)
    assert theirs[:8].view(np.uint64)[0] == 2 and len(others) == 1000


def test_blocks_without_end_are_refused(domain):
    base = np.zeros(8, np.uint8)
    with pytest.raises(rdma.MisuseError, match="2\\^32"):
        domain.register(base).blocks_of(np.broadcast_to(base[0:1], (1 << 40, 1)))


def test_slices(domain):
    region = domain.register(np.arange(100, dtype=np.uint8), rdma.Access.REMOTE)
    assert (len(region), len(region[10:]), len(region[10:20][5:]), len(region[-10:])) == (100, 90, 5, 10)
    assert (len(region[:].remote()), len(region.remote()[3:5])) == (100, 2)
    beyond = [slice(0, 1 << 63), slice(-101, 10), slice(-(1 << 70), None)]
    for wrong in [slice(5, 5), slice(50, 40), slice(0, 101), slice(100, None), slice(200, 300), *beyond]:
        with pytest.raises(rdma.MisuseError, match="empty or not inside the 100 bytes"):
            region[wrong]
        with pytest.raises(rdma.MisuseError, match="empty or not inside the 100 bytes"):
            region.remote()[wrong]
    with pytest.raises(rdma.MisuseError, match="step 2"):
        region[::2]
    with pytest.raises(TypeError, match="byte ranges"):
        region[3]
    assert region.access == rdma.Access.REMOTE and region.path == "HostMemory"


def test_concatenation_and_self_check(pair):
    parts = [filled(100, seed) for seed in range(3)]
    region = rdma.Region.concat([pair.near_domain.register(part, rdma.Access.REMOTE) for part in parts])
    region.self_check()
    crosses(pair, region, b"".join(part.tobytes() for part in parts))
    with pytest.raises(rdma.MisuseError):
        rdma.Region.concat([])


class Mallinfo(ctypes.Structure):
    """mallinfo2 of glibc, in bytes but where "blks" counts chunks."""

    names = ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"]
    _fields_ = [(name, ctypes.c_size_t) for name in names]


def allocated():
    """Bytes that malloc has lent, and blocks that Python has. Resident pages also change when the kernel makes huge ones."""
    gc.collect()
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Mallinfo
    lent = mallinfo()
    return lent.uordblks + lent.hblkhd, sys.getallocatedblocks()


def test_many_registrations_leave_nothing(domain):
    """What grows shows after some thousands. DMABUF_RDMA_REGISTRATIONS=100000 takes two minutes in an emulated guest."""
    memory = np.zeros(4096, np.uint8)

    def rounds(count):
        for _ in range(count):
            region = domain.register(memory, rdma.Access.REMOTE)
            region.strided(8, 16, 100).select(np.arange(0, 100, 3))
            bytes(region[100:].remote())

    count = int(os.environ.get("DMABUF_RDMA_REGISTRATIONS", 3000))
    rounds(300)
    base = sys.getrefcount(memory)
    # Once there may be 940 KiB more, which is what a dict of 65,536 slots takes in Python 3.11. A leak grows each time.
    for _ in range(3):
        before = allocated()
        rounds(count)
        grown = [now - then for now, then in zip(allocated(), before)]
        print(f"{count} registrations: {grown} bytes of malloc and blocks of Python more")
        # Less than one of the smallest allocations each time.
        if grown[0] < 16 * count and grown[1] < count // 10:
            break
    else:
        raise AssertionError(grown)
    assert sys.getrefcount(memory) == base
