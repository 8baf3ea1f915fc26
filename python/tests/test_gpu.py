"""Objects with __cuda_array_interface__ and DLPack tensors of a GPU, with the stub driver of tests/stubs.

The stub's memory is a udmabuf, and the CPU can reach it at the pointer. Each test runs in a process of its own, because a
driver stays loaded.
"""

import ctypes
import gc
import os
import weakref

import numpy as np
import pytest

import dmabuf_rdma as rdma
from conftest import Child, Pair, filled


def with_driver(test):
    """Runs a test in a child that has loaded the driver, which xtask has built."""

    # Not `wraps`: pytest would look for fixtures of the test's arguments.
    def run():
        Child(lambda: on_driver(test)).result()

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


def on_driver(test):
    cuda = ctypes.CDLL(os.environ["DMABUF_RDMA_STUB_CUDA"])
    cuda.stub_misuse.restype = ctypes.c_char_p
    context = ctypes.c_void_p()
    assert cuda.cuInit(0) == 0
    assert cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 100) == 0
    assert cuda.cuCtxPushCurrent_v2(context) == 0
    test(cuda, Pair())
    gc.collect()
    assert cuda.stub_misuse() is None, cuda.stub_misuse()


class Memory:
    """An allocation of the GPU."""

    def __init__(self, cuda, nbytes):
        address = ctypes.c_uint64()
        assert cuda.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(nbytes)) == 0
        self.cuda, self.address, self.nbytes = cuda, address.value, nbytes

    def bytes(self):
        return (ctypes.c_uint8 * self.nbytes).from_address(self.address)

    def free(self):
        assert self.cuda.cuMemFree_v2(ctypes.c_uint64(self.address)) == 0


class Tensor:
    """As PyTorch's and CuPy's: some bytes of an allocation."""

    def __init__(self, memory, start, shape, typestr="|u1", strides=None, read_only=False):
        self.memory = memory
        self.__cuda_array_interface__ = {
            "data": (memory.address + start, read_only),
            "shape": shape,
            "strides": strides,
            "typestr": typestr,
            "version": 3,
        }


@with_driver
def test_tensors_share_the_registration_of_their_allocation(cuda, pair):
    memory = Memory(cuda, 4 << 20)
    memory.bytes()[:] = filled(4 << 20).tobytes()
    before = rdma.gauges()["cache"]
    tensors = [Tensor(memory, 4096 * at + 64, (8, 100), "<f4") for at in range(100)]
    regions = [pair.near_domain.register(tensor, rdma.Access.REMOTE) for tensor in tensors]
    assert cuda.stub_count(b"exports") == 1
    cache = {name: now - before[name] for name, now in rdma.gauges()["cache"].items()}
    assert (cache["misses"], cache["hits"], cache["entries"]) == (1, 99, 1), cache
    assert regions[7].nbytes == 3200 and regions[7].path in ("Verbs", "Uverbs")
    theirs = np.zeros(3200, np.uint8)
    far = pair.far_domain.register(theirs, rdma.Access.REMOTE)
    pair.near.write(regions[7], far.remote()).wait(timeout=60)
    assert theirs.tobytes() == bytes(memory.bytes()[4096 * 7 + 64 : 4096 * 7 + 64 + 3200])
    # Both ways, and a part by its view.
    theirs[:] = filled(3200, 5)
    pair.far.write(far, regions[9].remote()).wait(timeout=60)
    assert bytes(memory.bytes()[4096 * 9 + 64 :][:3200]) == theirs.tobytes()
    column = Tensor(memory, 4096 * 9 + 64 + 40, (8, 10), "<f4", strides=(400, 4))
    pair.near.write(regions[9].blocks_of(column), far[:320].remote().strided(40, 40, 8)).wait(timeout=60)
    rows = np.frombuffer(memory.bytes(), np.uint8)[4096 * 9 + 64 :][:3200].reshape(8, 400)
    assert (theirs[:320].reshape(8, 40) == rows[:, 40:80]).all()
    with pytest.raises(rdma.MisuseError, match="not contiguous"):
        pair.near_domain.register(column)
    # The region of the allocation does not keep the tensor; ours does, and so does a transfer.
    gone = weakref.ref(tensors[3])
    region = regions[3]
    del regions
    tensors.clear()
    gc.collect()
    assert gone() is not None
    writing = pair.near.write(region, far.remote())
    del region
    assert gone() is not None
    writing.wait(timeout=60)
    del writing
    gc.collect()
    assert gone() is None
    assert pair.near_domain.clear_cache() == 1
    memory.free()


@with_driver
def test_what_a_gpu_refuses(cuda, pair):
    memory = Memory(cuda, 1 << 20)
    with pytest.raises(rdma.AccessError, match="read-only"):
        pair.near_domain.register(Tensor(memory, 0, (100,), read_only=True), rdma.Access.REMOTE)
    pair.near_domain.register(Tensor(memory, 0, (100,), read_only=True))
    with pytest.raises(rdma.MisuseError, match="no bytes"):
        pair.near_domain.register(Tensor(memory, 0, (0,)))
    with pytest.raises(rdma.MisuseError, match="1048576"):
        pair.near_domain.register(Tensor(memory, 100, (1 << 20,)))
    host = np.zeros(8)

    class Liar:
        __cuda_array_interface__ = dict(host.__array_interface__)
    with pytest.raises(rdma.Error, match="host memory"):
        pair.near_domain.register(Liar())
    # A pointer of the GPU, and one of the host.
    region = pair.near_domain.register((memory.address, 4096), rdma.Access.REMOTE, unsafe=True)
    assert region.path in ("Verbs", "Uverbs")
    region = pair.near_domain.register((host.ctypes.data, 64), unsafe=True)
    assert region.path == "HostMemory"
    del region
    pair.near_domain.clear_cache()
    memory.free()


@with_driver
def test_dlpack_of_a_gpu(cuda, pair):
    class DL(ctypes.Structure):
        _fields_ = [
            ("data", ctypes.c_void_p),
            ("device", ctypes.c_int),
            ("id", ctypes.c_int),
            ("ndim", ctypes.c_int),
            ("code", ctypes.c_uint8),
            ("bits", ctypes.c_uint8),
            ("lanes", ctypes.c_uint16),
            ("shape", ctypes.c_void_p),
            ("strides", ctypes.c_void_p),
            ("offset", ctypes.c_uint64),
            ("context", ctypes.c_void_p),
            ("deleter", ctypes.c_void_p),
        ]

    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]

    class Lender:
        def __init__(self, memory, device, offset=0, bits=8):
            self.shape = (ctypes.c_int64 * 2)(10, 100)
            self.device = device
            self.tensor = DL(memory.address, device, 0, 2, 1, bits, 1, ctypes.addressof(self.shape), None, offset)

        def __dlpack_device__(self):
            return self.device, 0

        def __dlpack__(self, *, stream=None):
            return new(ctypes.addressof(self.tensor), b"dltensor", None)

    memory = Memory(cuda, 1 << 20)
    memory.bytes()[:] = filled(1 << 20).tobytes()
    region = pair.near_domain.register(Lender(memory, 2, offset=256), rdma.Access.REMOTE)
    assert region.nbytes == 1000
    theirs = np.zeros(1000, np.uint8)
    far = pair.far_domain.register(theirs, rdma.Access.REMOTE)
    pair.near.write(region, far.remote()).wait(timeout=60)
    assert theirs.tobytes() == bytes(memory.bytes()[256:1256])
    for device, words in [(8, "Metal"), (13, "managed memory"), (99, "type 99")]:
        with pytest.raises(rdma.UnsupportedError, match=words):
            pair.near_domain.register(Lender(memory, device))
    with pytest.raises(rdma.UnsupportedError, match="elements of 4 bits"):
        pair.near_domain.register(Lender(memory, 2, bits=4))

    class Broken:
        def __dlpack__(self):
            return 7

    with pytest.raises(TypeError, match="producer is broken"):
        pair.near_domain.register(Broken())
    del region
    pair.near_domain.clear_cache()
    memory.free()
