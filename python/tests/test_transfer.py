"""Transfers, tables of blocks, notifications and connections, blocking."""

import gc
import os
import pickle
import signal
import sys
import threading
import time

import numpy as np
import pytest

import dmabuf_rdma as rdma
from conftest import ADDRESS, Pair, filled, until_no_thread_connects
from natively import remote_of


def test_write_read_send_receive(pair):
    ours, near, theirs, far = pair.memory()
    ours[:] = filled(ours.size)
    remote = far.remote()
    assert pair.near.write(near, remote).wait(timeout=30) == ours.size
    assert (theirs == ours).all()
    theirs[:1000] = 7
    pair.near.read(near[:1000], remote[:1000]).wait(timeout=30)
    assert (ours[:1000] == 7).all()
    receiving = pair.far.recv(far[:5000])
    ours[:5000] = filled(5000, 3)
    assert pair.near.send(near[:5000]).wait(timeout=30) == receiving.wait(timeout=30) == 5000
    assert (theirs[:5000] == ours[:5000]).all()


def test_atomics(pair):
    ours, near, theirs, far = pair.memory(4096)
    theirs.view(np.uint64)[1] = 40
    pair.near.fetch_add(near[:8], far.remote()[8:16], 2).wait(timeout=30)
    assert (ours.view(np.uint64)[0], theirs.view(np.uint64)[1]) == (40, 42)
    pair.near.compare_swap(near[:8], far.remote()[8:16], 42, 7).wait(timeout=30)
    assert (ours.view(np.uint64)[0], theirs.view(np.uint64)[1]) == (42, 7)


@pytest.mark.parametrize("kind", [np.int64, np.uint32, np.int16, np.uint8, list, iter])
def test_tables_of_integers_of_every_kind(pair, kind):
    ours, near, theirs, far = pair.memory(256 * 16)
    ours[:] = filled(ours.size)
    numbers = np.array([5, 0, 250, 77])
    if kind in (list, iter):
        indices = kind(numbers.tolist())
    else:
        indices = numbers.astype(kind)
    table = near.strided(16, 16, 256).select(indices)
    assert [table[at] for at in range(4)] == [(16 * int(at), 16) for at in numbers]
    with pytest.raises(TypeError, match="flatnonzero"):
        near.strided(16, 16, 256).select(np.zeros(256, bool))
    there = far.remote().blocks(16, np.arange(0, 64, 16, dtype=np.uint16))
    pair.near.write(table, there).wait(timeout=30)
    assert (theirs[:64].reshape(4, 16) == ours.reshape(256, 16)[numbers]).all()


def test_tables(pair):
    _, near, _, far = pair.memory(4096)
    strides = np.arange(0, 4096, 8)[::-2]
    table = near.blocks(8, strides)
    assert (len(table), table.nbytes, table[0], table[-1]) == (256, 2048, (4088, 8), (8, 8))
    ranges = near.ranges(np.array([0, 100]), np.array([50, 101]))
    assert (ranges[0], ranges[1], ranges.nbytes) == ((0, 50), (100, 1), 51)
    with pytest.raises(IndexError):
        table[256]
    with pytest.raises(rdma.MisuseError, match="offsets: number 1 is -8"):
        near.blocks(8, np.array([0, -8]))
    with pytest.raises(rdma.MisuseError, match="indices: number 0 is -1"):
        table.select(np.array([-1], np.int8))
    with pytest.raises(rdma.MisuseError, match="block 1"):
        near.blocks(8, np.array([0, 4090, 8]))
    with pytest.raises(rdma.MisuseError, match="256"):
        table.select([0, 256])
    with pytest.raises(rdma.MisuseError):
        table.select(np.array([], np.int64))
    with pytest.raises(TypeError, match="astype"):
        near.blocks(8, np.array([0.0]))
    with pytest.raises(rdma.MisuseError, match="one dimension"):
        near.blocks(8, np.zeros((2, 2), np.int64))
    with pytest.raises(TypeError, match="byte order"):
        near.blocks(8, np.array([8], ">i8"))
    with pytest.raises(rdma.MisuseError, match="'x'"):
        near.blocks(8, ["x"])
    with pytest.raises(TypeError, match="iterable"):
        near.blocks(8, 7)
    for starts, stops, which in [([-3], [4], "starts"), ([3], [-4], "stops")]:
        with pytest.raises(rdma.MisuseError, match=f"{which}: number 0 is -"):
            near.ranges(np.array(starts), np.array(stops))
    with pytest.raises(rdma.MisuseError, match="(?s)block 1.*4..2 ends before"):
        near.ranges(np.array([0, 4]), np.array([1, 2]))
    with pytest.raises(rdma.MisuseError, match="2 starts and 1 stops"):
        near.ranges([0, 1], [2])
    with pytest.raises(rdma.MisuseError):
        near.strided(8, 8, 0)
    with pytest.raises(rdma.MisuseError):
        pair.near.write(near.strided(8, 8, 4), far.remote().strided(8, 8, 5))


def test_a_table_of_100_000_blocks():
    """natively.py measures it on the host."""
    offsets = np.random.default_rng(1).permutation(100_000) * (16 << 10)
    table = remote_of(1 << 40).blocks(16 << 10, offsets)
    chosen = table.select(np.arange(100_000)[::-1])
    assert (len(chosen), chosen[0], chosen[-1]) == (100_000, (int(offsets[-1]), 16 << 10), (int(offsets[0]), 16 << 10))


def test_descriptions_are_plain_data(pair):
    _, _, _, far = pair.memory(4096)
    remote = far.remote()
    assert rdma.RemoteRegion.from_bytes(bytes(remote)) == remote == pickle.loads(pickle.dumps(remote))
    part = pickle.loads(pickle.dumps(remote[100:300]))
    assert (part.nbytes, part.access, len(bytes(part))) == (200, rdma.Access.REMOTE, 52)
    first, rest = rdma.RemoteRegion.split_from(bytes(remote) + b"\0\0more")
    assert (first, rest) == (remote, b"\0\0more")
    table = remote[100:].strided(8, 16, 10)
    again = pickle.loads(pickle.dumps(table))
    assert [again[at] for at in range(10)] == [(100 + offset, length) for offset, length in (table[at] for at in range(10))]
    assert len(rdma.RemoteBlocks.from_bytes(remote, bytes(table))) == 10
    endpoint = pair.near.endpoint
    assert pickle.loads(pickle.dumps(endpoint)) == endpoint and len(bytes(endpoint)) == 44
    assert endpoint.address == ADDRESS["rxe0"]
    for wrong in [b"", b"x" * 52, bytes(remote)[:-1], bytes(remote)[:20] + b"\xff" + bytes(remote)[21:]]:
        with pytest.raises(rdma.InvalidDataError):
            rdma.RemoteRegion.from_bytes(wrong)
        with pytest.raises(rdma.InvalidDataError):
            rdma.Endpoint.from_bytes(wrong)
        with pytest.raises(rdma.InvalidDataError):
            rdma.RemoteBlocks.from_bytes(remote, wrong)


def test_notifications(notified):
    pair = notified
    ours, near, theirs, far = pair.memory()
    ours[:] = filled(ours.size)
    arrived = pair.far.notifications
    assert arrived.try_take() is None
    for layer in range(4):
        pair.near.write_notify(near, far.remote(), layer)
    pair.near.notify(9, b"payload").wait(timeout=30)
    for layer in range(4):
        arrived.wait(layer, timeout=30)
    assert (theirs == ours).all()
    last = arrived.take(timeout=30)
    assert (last.id, last.payload, last.qp_num) == (9, b"payload", pair.far.endpoint.qp_num)
    start = time.monotonic()
    with pytest.raises(rdma.TimeoutError, match=r"0 of 2 notifications of id 5 came within 600ms") as late:
        arrived.wait(5, 2, timeout=0.6)
    assert 0.6 <= time.monotonic() - start < 10 and isinstance(late.value, TimeoutError)
    with pytest.raises(rdma.MisuseError):
        pair.near.notify(1, b"x" * 65)
    # Messages have a queue pair of their own.
    receiving = pair.far.recv(far[:10])
    pair.near.send(near[:10]).wait(timeout=30)
    receiving.wait(timeout=30)
    with pytest.raises(rdma.MisuseError):
        Pair().far.notifications.take(timeout=1)


def test_a_worker_for_many(domain):
    far_domain = rdma.Domain("rxe1")
    worker = far_domain.worker(notifications=64)
    senders, numbers = [], []
    for _ in range(3):
        near, far = domain.connection(), worker.connection(window=8)
        near.connect(far.endpoint)
        far.connect(near.endpoint)
        senders.append((near, far))
        numbers.append(far.endpoint.qp_num)
    for at, (near, _) in enumerate(senders):
        near.notify(at).wait(timeout=30)
    seen = {(taken.id, taken.qp_num) for taken in (worker.notifications.take(timeout=30) for _ in range(3))}
    assert seen == set(enumerate(numbers))


def test_connections_by_address():
    listener = rdma.Listener((ADDRESS["rxe1"], 0))
    theirs = np.zeros(1000, np.uint8)
    told = {}

    def serve():
        incoming = listener.accept(timeout=30)
        told.update(device=incoming.device, data=incoming.private_data[:5], peer=incoming.peer[0])
        domain = rdma.Domain(incoming.device)
        region = domain.register(theirs, rdma.Access.REMOTE)
        with incoming.accept(domain, bytes(region.remote()), notifications=4) as connection:
            connection.notifications.wait(1, timeout=30)
        with pytest.raises(rdma.MisuseError, match="already"):
            incoming.reject()

    server = threading.Thread(target=serve)
    server.start()
    connection = rdma.connect(listener.address, private_data=b"hello", source=ADDRESS["rxe0"])
    assert connection.domain.device == "rxe0"
    remote, _ = rdma.RemoteRegion.split_from(connection.private_data)
    ours = filled(1000)
    connection.write_notify(connection.domain.register(ours), remote, 1).wait(timeout=30)
    server.join()
    assert told == {"device": "rxe1", "data": b"hello", "peer": ADDRESS["rxe0"]}
    assert (theirs == ours).all()
    with pytest.raises(rdma.Error):
        while True:
            connection.write(connection.domain.register(ours), remote).wait(timeout=30)
    assert not connection.is_usable and connection.failure


def test_connections_that_fail():
    with pytest.raises(rdma.PeerGoneError) as refused:
        rdma.connect((ADDRESS["rxe1"], 1), timeout=120)
    assert isinstance(refused.value, ConnectionError)
    listener = rdma.Listener((ADDRESS["rxe1"], 0))
    start = time.monotonic()
    with pytest.raises(rdma.TimeoutError, match="600ms"):
        listener.accept(timeout=0.6)
    assert time.monotonic() - start >= 0.6
    assert listener.try_accept() is None
    for wrong in ["nonsense", "192.168.77.1", ("host.invalid", 1)]:
        with pytest.raises(rdma.MisuseError, match="no address"):
            rdma.connect(wrong)
    with pytest.raises(TypeError, match="host:port"):
        rdma.connect(7)
    with pytest.raises(TypeError, match='no option "colour".*window'):
        rdma.Domain("rxe0").connection(colour=1)
    with pytest.raises(TypeError, match="option window"):
        rdma.Domain("rxe0").connection(window="many")
    with pytest.raises(rdma.MisuseError, match="-1 s is not a time"):
        rdma.Domain("rxe0").connection(stall_timeout=-1)


def test_errors_are_python_errors_with_the_library_s_words(pair):
    _, near, _, far = pair.memory(4096)
    with pytest.raises(rdma.MisuseError) as short:
        pair.near.write(near, far.remote()[:100])
    assert short.value.kind == "Misuse" and short.value.errno is None and short.value.hint
    assert isinstance(short.value, ValueError) and "4096" in str(short.value)
    again = pickle.loads(pickle.dumps(short.value))
    assert type(again) is rdma.MisuseError and str(again) == str(short.value) and again.hint == short.value.hint
    described = bytes(far.remote())
    del far
    gc.collect()
    with pytest.raises(rdma.TransportError, match="REM_ACCESS_ERR") as failed:
        pair.near.write(near, rdma.RemoteRegion.from_bytes(described)).wait(timeout=30)
    assert isinstance(failed.value, ConnectionError)
    with pytest.raises(rdma.Error):
        pair.near.write(near, rdma.RemoteRegion.from_bytes(described))
    with pytest.raises(TypeError, match="Region or Blocks"):
        pair.near.write(np.zeros(4), near.remote())
    with pytest.raises(TypeError, match="RemoteRegion or RemoteBlocks"):
        pair.near.write(near, near)
    with pytest.raises(rdma.MisuseError):
        foreign = rdma.Domain("rxe0").register(np.zeros(4096, np.uint8))
        Pair().near.write(foreign, rdma.RemoteRegion.from_bytes(described))


def test_timeouts(pair):
    _, near, _, far = pair.memory(4096)
    start = time.monotonic()
    receiving = pair.far.recv(far)
    with pytest.raises(rdma.TimeoutError, match="goes on"):
        receiving.wait(timeout=0.6)
    assert 0.6 <= time.monotonic() - start < 10 and not receiving.done()
    pair.near.send(near).wait(timeout=30)
    assert receiving.wait(timeout=30) == 4096 and receiving.done() and receiving.progress == 4096
    with pytest.raises(rdma.TimeoutError, match="stays posted"):
        pair.far.recv(far, timeout=0.3).wait()
    # The posted receive goes on in the next one.
    receiving = pair.far.recv(far)
    pair.near.send(near).wait(timeout=30)
    receiving.wait(timeout=30)
    for wrong in [-1.0, float("nan"), float("inf")]:
        with pytest.raises(ValueError, match="not a time"):
            receiving.wait(timeout=wrong)


def test_cancellation(pair):
    _, near, _, far = pair.memory(4096)
    receiving = pair.far.recv(far)
    receiving.cancel()
    with pytest.raises(rdma.CancelledError):
        receiving.wait(timeout=30)
    assert pair.far.is_usable


def test_keyboard_interrupt_ends_every_wait(notified):
    pair = notified
    _, near, _, far = pair.memory(4096)
    listener = rdma.Listener((ADDRESS["rxe1"], 0))
    receiving = pair.far.recv(far)
    taking = pair.far.notifications
    for wait in [receiving.wait, lambda: taking.wait(1), taking.take, listener.accept]:
        killer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
        start = time.monotonic()
        killer.start()
        with pytest.raises(KeyboardInterrupt):
            wait()
        killer.join()
        assert 0.5 <= time.monotonic() - start < 10
    # Nothing is lost.
    pair.near.send(near).wait(timeout=30)
    receiving.wait(timeout=30)
    pair.near.notify(1).wait(timeout=30)
    taking.wait(1, timeout=30)


def test_keyboard_interrupt_ends_a_handshake(domain):
    listener = rdma.Listener((ADDRESS["rxe1"], 0))
    killer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    killer.start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        # Nobody accepts it.
        rdma.connect(listener.address, domain, timeout=60)
    assert 0.5 <= time.monotonic() - start < 30
    killer.join()
    # This rejects the request, so the handshake ends.
    del listener
    until_no_thread_connects()


def test_the_gil_is_released_while_something_waits(pair):
    _, near, _, far = pair.memory(4096)
    receiving = pair.far.recv(far)
    waiter = threading.Thread(target=receiving.wait)
    waiter.start()
    count, end = 0, time.monotonic() + 0.5
    while time.monotonic() < end:
        count += 1
    assert count > 1000 and waiter.is_alive()
    pair.near.send(near).wait(timeout=30)
    waiter.join(30)
    assert not waiter.is_alive()


def test_threads_share_a_connection(pair):
    _, near, theirs, far = pair.memory(8 * 4096)
    ours, remote, failures = near, far.remote(), []

    def work(at):
        try:
            for _ in range(20):
                part = slice(4096 * at, 4096 * (at + 1))
                assert pair.near.write(ours[part], remote[part]).wait(timeout=60) == 4096
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=work, args=(at,)) for at in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_what_is_dropped_goes_on(pair):
    ours, near, theirs, far = pair.memory(1 << 20)
    ours[:] = filled(ours.size)
    for _ in range(8):
        pair.near.write(near, far.remote())
    base = sys.getrefcount(ours)
    pair.near.write(near[:8], far.remote()[:8]).wait(timeout=60)
    assert (theirs == ours).all() and sys.getrefcount(ours) == base


def test_help_teaches():
    for item in rdma.__all__:
        thing = getattr(rdma, item)
        if item == "__version__":
            continue
        assert thing.__doc__, item
        for name, member in vars(thing).items() if isinstance(thing, type) else ():
            if not name.startswith("_") and thing.__module__.startswith("dmabuf_rdma") and not isinstance(member, int):
                if name not in ("kind", "id", "payload", "qp_num", "errno", "hint"):
                    assert member.__doc__, f"{item}.{name}"
