"""Transfers, notifications and requests in asyncio."""

import asyncio
import gc
import os
import subprocess
import threading
import time

import numpy as np
import pytest

import dmabuf_rdma as rdma
from conftest import ADDRESS, Pair, filled, until_no_thread_connects


def test_transfers_are_awaited(pair):
    async def main():
        ours, near, theirs, far = pair.memory()
        ours[:] = filled(ours.size)
        assert await pair.near.write(near, far.remote()) == ours.size
        assert (theirs == ours).all()
        receiving = asyncio.create_task(await_(pair.far.recv(far[:100])))
        await asyncio.sleep(0.05)
        assert await pair.near.send(near[:100]) == 100
        assert await receiving == 100
        # Once more: the result stays.
        transfer = pair.near.write(near, far.remote())
        assert await transfer == await transfer == ours.size

    asyncio.run(main())


async def await_(thing):
    return await thing


def test_several_tasks_await_one_transfer(pair):
    async def main():
        _, near, theirs, far = pair.memory()
        receiving = pair.far.recv(far[:100])
        tasks = [asyncio.create_task(await_(receiving)) for _ in range(3)]
        await asyncio.sleep(0.05)
        await pair.near.send(near[:100])
        async with asyncio.timeout(30):
            assert await asyncio.gather(*tasks) == [100] * 3

    asyncio.run(main())


def test_a_hundred_tasks(notified):
    pair = notified

    async def main():
        ours, near, theirs, far = pair.memory(100 * 4096)
        ours[:] = filled(ours.size)
        remote = far.remote()
        before = threading.active_count()

        async def one(at):
            part = slice(4096 * at, 4096 * (at + 1))
            for _ in range(3):
                assert await pair.near.write(near[part], remote[part], timeout=60) == 4096
            await pair.near.notify(at)

        async def other(at):
            await pair.far.notifications.arrived(at)

        async with asyncio.timeout(300), asyncio.TaskGroup() as group:
            for at in range(100):
                group.create_task(one(at))
                group.create_task(other(at))
        assert threading.active_count() == before, "no thread a transfer"
        assert (theirs == ours).all()

    asyncio.run(main())


def test_the_loop_sleeps_while_it_waits(pair):
    """No polling tick: the process uses next to no CPU time, and the loop makes next to no turns."""

    async def main():
        _, _, _, far = pair.memory(4096)
        loop, turns = asyncio.get_running_loop(), 0
        select = loop._selector.select

        def counted(timeout):
            nonlocal turns
            turns += 1
            return select(timeout)

        loop._selector.select = counted
        receiving = asyncio.create_task(await_(pair.far.recv(far)))
        await asyncio.sleep(0.1)
        turns, used = 0, time.process_time()
        await asyncio.sleep(2)
        assert turns <= 3 and time.process_time() - used < 0.5, turns
        receiving.cancel()

    asyncio.run(main())


def test_timeouts_come_without_an_event(pair):
    async def main():
        _, near, _, far = pair.memory(4096)
        start = time.monotonic()
        with pytest.raises(rdma.TimeoutError, match="stays posted"):
            await pair.far.recv(far, timeout=0.5)
        assert 0.5 <= time.monotonic() - start < 10
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await pair.far.recv(far)
        # The connection is usable.
        receiving = pair.far.recv(far)
        await pair.near.send(near)
        await receiving

    asyncio.run(main())


def test_notifications_are_awaited_and_iterated(notified):
    pair = notified

    async def main():
        _, near, _, far = pair.memory(4096)
        taken = []

        async def take():
            async for notification in pair.far.notifications:
                taken.append((notification.id, notification.payload))
                if notification.id == 9:
                    return

        taker = asyncio.create_task(take())
        await asyncio.sleep(0.05)
        await pair.near.write_notify(near, far.remote(), 3)
        await pair.near.notify(9, b"end")
        await taker
        assert taken == [(3, b""), (9, b"end")]
        arrival = pair.far.notifications.arrived(4, 2)
        await pair.near.notify(4)
        await pair.near.notify(4)
        await arrival
        with pytest.raises(rdma.MisuseError, match="awaited already"):
            await arrival

    asyncio.run(main())


def test_cancellation_at_every_await(notified):
    pair = notified

    async def main():
        ours, near, theirs, far = pair.memory(4096)
        listener = rdma.Listener((ADDRESS["rxe1"], 0))
        waits = [
            lambda: await_(pair.far.recv(far)),
            lambda: await_(pair.far.notifications.arrived(1)),
            lambda: await_(pair.far.notifications.recv()),
            lambda: await_(pair.far.notifications.__anext__()),
            lambda: listener.accept_async(),
        ]
        for wait in waits:
            for delay in [0, 0.02]:
                task = asyncio.ensure_future(wait())
                await asyncio.sleep(delay)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
        # None was taken, and the posted receive goes on.
        receiving = pair.far.recv(far)
        ours[:] = filled(4096)
        await pair.near.send(near)
        await receiving
        assert (theirs == ours).all()
        await pair.near.notify(1)
        await pair.far.notifications.arrived(1)
        # A write that is cancelled at any moment leaves the connection usable.
        big, big_near, _, big_far = pair.memory(4 << 20)
        for delay in [0, 0.001, 0.01, 0.1]:
            task = asyncio.ensure_future(await_(pair.near.write(big_near, big_far.remote())))
            await asyncio.sleep(delay)
            task.cancel()
            try:
                await task
            except asyncio.CancelledError:
                pass
            assert pair.near.is_usable
        await pair.near.write(near, far.remote())

    asyncio.run(main())


class CancelledAt:
    """Runs a coroutine, and cancels its task where it waits for the ``at``th time."""

    def __init__(self, coroutine, at):
        self.coroutine, self.at = coroutine, at

    def __await__(self):
        steps, waits = self.coroutine.__await__(), 0
        step, argument = steps.send, None
        while True:
            try:
                future = step(argument)
            except StopIteration as ended:
                return ended.value
            waits += 1
            if waits == self.at:
                asyncio.current_task().cancel()
            try:
                yield future
                step, argument = steps.send, None
            except BaseException as error:  # noqa: BLE001
                step, argument = steps.throw, error


async def everything(pair, near, far):
    """Awaits each kind of transfer and arrival once."""
    remote = far.remote()
    receiving = pair.far.recv(far[:64])
    await pair.near.send(near[:64])
    await receiving
    await pair.near.write(near, remote)
    await pair.near.write(near.strided(64, 128, 32), remote.strided(64, 128, 32))
    await pair.near.read(near, remote)
    await pair.near.fetch_add(near[:8], remote[:8], 1)
    await pair.near.compare_swap(near[:8], remote[:8], 1, 2)
    await pair.near.write_notify(near, remote, 1)
    await pair.far.notifications.arrived(1)
    for id in [2, 3]:
        await pair.near.notify(id, b"payload")
    await pair.far.notifications.recv()
    async for notification in pair.far.notifications:
        assert notification.id == 3
        break


@pytest.fixture
def slow_wire():
    """Packets take 15 ms each way, so that a task waits for every transfer."""
    tc = lambda *words: subprocess.run(["tc", "qdisc", *words], check=True)  # noqa: E731
    for end in ["wire0", "wire1"]:
        tc("add", "dev", end, "root", "netem", "delay", "15ms")
    yield
    for end in ["wire0", "wire1"]:
        tc("del", "dev", end, "root")


def test_cancellation_where_a_task_waits_for_the_nth_time(slow_wire):
    async def cancelled(at):
        pair = Pair(notifications=8)
        _, near, _, far = pair.memory(4096)
        try:
            await asyncio.create_task(await_(CancelledAt(everything(pair, near, far), at)))
        except asyncio.CancelledError:
            # Other memory: the messages in flight still use that one.
            ours, near, theirs, far = pair.memory(4096)
            ours[:] = filled(4096)
            assert pair.near.is_usable and pair.far.is_usable
            await pair.near.write(near, far.remote())
            assert (theirs == ours).all()
            return True
        return False

    waits = 0
    while asyncio.run(cancelled(waits + 1)):
        waits += 1
    # At least once for each transfer that crosses the wire.
    assert waits >= 9, waits


def test_a_cancelled_handshake_goes_on_without_its_task(pair):
    """The task ends at once, and the thread of the handshake with the handshake."""

    async def main():
        listener = rdma.Listener((ADDRESS["rxe1"], 0))
        connecting = asyncio.create_task(rdma.connect_async(listener.address, pair.near_domain, timeout=60))
        incoming = await listener.accept_async()
        connecting.cancel()
        start = time.monotonic()
        with pytest.raises(asyncio.CancelledError):
            await connecting
        assert time.monotonic() - start < 30
        accepting = asyncio.create_task(rdma.accept_async(incoming, pair.far_domain, timeout=60))
        await asyncio.sleep(0)
        accepting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await accepting

    asyncio.run(main())
    until_no_thread_connects()


def test_two_loops_and_a_thread_on_one_connection(pair):
    _, near, _, far = pair.memory(64 * 4096)
    remote, failures = far.remote(), []

    async def one(at):
        part = slice(4096 * at, 4096 * (at + 1))
        for _ in range(5):
            await pair.near.write(near[part], remote[part], timeout=60)

    async def main(first):
        await asyncio.wait_for(asyncio.gather(*(one(first + at) for at in range(8))), 120)

    def blocking():
        for _ in range(20):
            pair.near.write(near[:4096], remote[:4096]).wait(timeout=60)

    def run(call):
        try:
            call()
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    calls = [lambda: asyncio.run(main(8)), lambda: asyncio.run(main(32)), blocking]
    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(150)
        assert not thread.is_alive(), "a task or a thread was not woken"
    assert not failures


def test_connecting(pair):
    async def main():
        listener = rdma.Listener((ADDRESS["rxe1"], 0))

        async def serve():
            incoming = await listener.accept_async()
            connection = await rdma.accept_async(incoming, pair.far_domain, b"welcome", notifications=4)
            return connection, await connection.notifications.recv()

        server = asyncio.create_task(serve())
        connection = await rdma.connect_async(listener.address, pair.near_domain)
        assert connection.private_data[:7] == b"welcome"
        await connection.notify(7, b"hello")
        other, notification = await server
        assert (notification.id, notification.payload) == (7, b"hello")
        # The peer's end ends the iteration.
        connection.disconnect()
        async with asyncio.timeout(60):
            assert [item async for item in other.notifications] == []

    asyncio.run(main())


def test_a_failure_resumes_every_task(pair):
    async def main():
        _, near, _, far = pair.memory(4096)
        receiving = [asyncio.create_task(await_(pair.far.recv(far[at * 8 : at * 8 + 8]))) for at in range(5)]
        await asyncio.sleep(0.05)
        pair.far.disconnect()
        ended = await asyncio.wait_for(asyncio.gather(*receiving, return_exceptions=True), 30)
        assert all(isinstance(error, rdma.Error) for error in ended), ended

    asyncio.run(main())


def test_a_loop_leaves_nothing(pair):
    _, near, _, far = pair.memory(4096)

    async def main():
        await pair.near.write(near, far.remote())
        # The first one is left posted, and each later one goes on with it.
        task = asyncio.create_task(await_(pair.far.recv(far)))
        await asyncio.sleep(0.05)
        # Left to asyncio.run, which cancels it.
        return task

    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        asyncio.run(main())
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
