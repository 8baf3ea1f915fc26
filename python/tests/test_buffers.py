"""Buffers that the package allocates, as memory of numpy."""

import os
import tempfile

import numpy as np
import pytest

import dmabuf_rdma as rdma
from conftest import filled


def exporters():
    return {"udmabuf": rdma.udmabuf, "system": rdma.heap}


@pytest.mark.parametrize("name", ["udmabuf", "system"])
def test_a_dmabuf_is_an_array(pair, name):
    dmabuf = exporters()[name](100_000)
    assert dmabuf.nbytes == 102_400 and dmabuf.exporter == name
    rows = dmabuf.numpy("float32", (10, 25), offset=4096)
    with dmabuf.cpu_access("w"):
        rows[:] = np.arange(250).reshape(10, 25)
    region = pair.near_domain.register(dmabuf, rdma.Access.REMOTE)
    assert region.path in ("Verbs", "Uverbs")
    theirs = np.zeros(1000, np.uint8)
    far = pair.far_domain.register(theirs, rdma.Access.REMOTE)
    pair.near.write(region[4096:5096], far.remote()).wait(timeout=30)
    assert theirs.tobytes() == rows.tobytes()
    # And back, by a view of the mapped memory as blocks.
    theirs[:] = filled(1000)
    pair.near.read(region.blocks_of(rows), far.remote().strided(1000, 1000, 1)).wait(timeout=30)
    with dmabuf.cpu_access("r"):
        assert rows.tobytes() == theirs.tobytes()


def test_views_keep_the_memory(domain):
    array = rdma.udmabuf(4096).numpy()
    array[:] = 7
    assert int(array.sum()) == 7 * 4096
    view = memoryview(rdma.HostBuffer(4096))
    view[5] = 3
    assert view[5] == 3 and not view.readonly


def test_host_buffers(pair):
    buffer = rdma.HostBuffer(1 << 20, pages="transparent")
    array = buffer.numpy("uint32", (512, 512))
    array[:] = np.arange(512 * 512).reshape(512, 512)
    assert not buffer.numpy().flags.owndata
    region = pair.near_domain.register(buffer, rdma.Access.REMOTE)
    theirs = rdma.HostBuffer(1 << 20)
    far = pair.far_domain.register(theirs, rdma.Access.REMOTE)
    pair.near.write(region, far.remote()).wait(timeout=30)
    assert theirs.numpy().tobytes() == array.tobytes()
    with pytest.raises(ValueError, match="pages are"):
        rdma.HostBuffer(4096, pages="huge")
    with pytest.raises(rdma.MisuseError):
        rdma.HostBuffer(0)
    with pytest.raises(rdma.OutOfMemoryError) as refused:
        rdma.HostBuffer(1 << 45)
    assert isinstance(refused.value, MemoryError)


def test_a_mapped_file(pair):
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        data = filled(10_000).tobytes()
        file.write(data)
        file.flush()
        buffer = rdma.HostBuffer.map_file(file.name, 5000, 9000)
        theirs = np.zeros(4000, np.uint8)
        far = pair.far_domain.register(theirs, rdma.Access.REMOTE)
        region = pair.near_domain.register(buffer, rdma.Access.REMOTE)
        pair.near.write(region, far.remote()).wait(timeout=30)
        assert theirs.tobytes() == data[5000:9000]
        theirs[:] = 9
        pair.near.read(region, far.remote()).wait(timeout=30)
        assert open(file.name, "rb").read()[5000:9000] == bytes([9]) * 4000
        frozen = rdma.HostBuffer.map_file(file.name, writable=False)
        assert memoryview(frozen).readonly
        with pytest.raises(rdma.AccessError):
            pair.near_domain.register(frozen, rdma.Access.REMOTE)
    with pytest.raises(FileNotFoundError):
        rdma.HostBuffer.map_file("/nowhere")


def test_a_descriptor_becomes_a_dmabuf(domain):
    dmabuf = rdma.heap(8192)
    again = rdma.DmaBuf(dmabuf.fileno())
    assert again.fileno() != dmabuf.fileno() and again.nbytes == 8192
    del dmabuf
    domain.register(again, rdma.Access.REMOTE)
    with open("/dev/null") as null, pytest.raises(rdma.MisuseError, match="/dev/null"):
        rdma.DmaBuf(null.fileno())
    for fd in [-1, 1 << 20]:
        with pytest.raises(rdma.MisuseError):
            rdma.DmaBuf(fd)


def test_host_mapping_is_asked_for(domain):
    own = rdma.udmabuf(4096)
    domain.register(own, rdma.Access.REMOTE, host_mapping=True)
    with pytest.raises(rdma.MisuseError, match="udmabuf that this process has made"):
        domain.register(rdma.heap(4096), host_mapping=True)


def test_cpu_access(domain):
    dmabuf = rdma.heap(4096)
    with pytest.raises(ValueError, match="mode"):
        dmabuf.cpu_access("x")
    bracket = dmabuf.cpu_access()
    with pytest.raises(BufferError, match="not begun"):
        bracket.__exit__(None, None, None)
    with bracket, bracket:
        pass


def test_missing_things_are_named():
    with pytest.raises(rdma.NotFoundError, match="no-such-heap") as missing:
        rdma.heap(4096, "no-such-heap")
    assert isinstance(missing.value, LookupError) and missing.value.hint
    with pytest.raises(rdma.NotFoundError, match="mlx5_7.*rxe0"):
        rdma.Domain("mlx5_7")
    with pytest.raises(rdma.MisuseError, match="name one of rxe0, rxe1"):
        rdma.Domain()
    assert rdma.devices() == ["rxe0", "rxe1"]


def test_a_child_of_fork_does_not_have_the_memory(domain):
    buffer = rdma.HostBuffer(4096)
    child = os.fork()
    if child == 0:
        try:
            memoryview(buffer)
        except rdma.MisuseError as refused:
            os._exit(0 if "fork" in str(refused) else 2)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    buffer.numpy()[0] = 1
