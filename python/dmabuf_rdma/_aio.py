"""Transfers, notifications and requests in asyncio.

The event loop watches the descriptor of each connection (or worker) that somebody waits for, and one of its own by which
other threads tell it. It sleeps until one of them is readable or the next timeout expires: there is no thread and no
polling.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Any

from . import _native
from ._errors import PeerGoneError

if TYPE_CHECKING:
    import asyncio

    from ._native import Connection, Domain, Incoming, Worker


class _Watch:
    """A descriptor that the loop watches, and those that wait for it."""

    __slots__ = ("driver", "waiting", "timer", "fd")

    def __init__(self, driver):
        self.fd = driver.fileno()
        self.driver = driver
        self.waiting = {}
        self.timer = None


class _Loop:
    """What waits in one event loop."""

    def __init__(self, loop):
        self._loop = weakref.ref(loop)
        self.wakes = _native.Wakes()
        self.tokens = itertools.count()
        self._watches = {}
        self._futures = {}

    def enter(self, token, driver):
        loop, fd = self._loop(), driver.fileno()
        if not self._watches:
            loop.add_reader(self.wakes.fileno(), self._woken)
        watch = self._watches.get(fd)
        if watch is None:
            watch = _Watch(driver)
            loop.add_reader(fd, self._readable, watch)
            self._watches[fd] = watch
        watch.waiting[token] = driver
        return watch

    def leave(self, token, watch):
        loop = self._loop()
        self._futures.pop(token, None)
        watch.waiting.pop(token, None)
        if watch.waiting:
            # Connections of a worker share a descriptor, and none is held longer than somebody waits for it.
            watch.driver = next(iter(watch.waiting.values()))
            return
        if watch.timer is not None:
            watch.timer.cancel()
        del self._watches[watch.fd]
        if not loop.is_closed():
            loop.remove_reader(watch.fd)
            if not self._watches:
                loop.remove_reader(self.wakes.fileno())

    def _resume(self, token):
        future = self._futures.get(token)
        if future is not None and not future.done():
            future.set_result(None)

    def _woken(self):
        for token in self.wakes.take():
            self._resume(token)

    def _readable(self, watch):
        if isinstance(watch.driver, _native.Listener):
            for token in list(watch.waiting):
                self._resume(token)
        else:
            self.process(watch)

    def process(self, watch):
        """Makes progress, resumes those that have ended, and sets the timer."""
        if isinstance(watch.driver, _native.Listener):
            # Nothing but a request makes progress.
            return
        self.wakes.begin()
        try:
            left = watch.driver.process()
        finally:
            tokens = self.wakes.take()
        for token in tokens:
            self._resume(token)
        if left is None:
            return
        loop = self._loop()
        due = loop.time() + left
        if watch.timer is not None:
            if watch.timer.when() <= due and not watch.timer.cancelled():
                return
            watch.timer.cancel()
        watch.timer = loop.call_at(due, self._expired, watch)

    def _expired(self, watch):
        watch.timer = None
        if watch.waiting:
            self.process(watch)

    def future(self, token):
        future = self._futures[token] = self._loop().create_future()
        return future


_loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Loop] = weakref.WeakKeyDictionary()


async def wait(source):
    """Waits in the running loop for what ``source`` has."""
    # Here, because it takes five times as long to import as the package, and whoever waits in a loop has it.
    import asyncio

    loop = asyncio.get_running_loop()
    state = _loops.get(loop)
    if state is None:
        state = _loops[loop] = _Loop(loop)
    token = next(state.tokens)
    outcome = source._poll(state.wakes, token)
    if outcome is not None:
        return outcome[0]
    watch = state.enter(token, source._driver())
    try:
        while True:
            future = state.future(token)
            outcome = source._poll(state.wakes, token)
            if outcome is not None:
                return outcome[0]
            # Arms the descriptor, and finds the next timeout.
            state.process(watch)
            await future
    except asyncio.CancelledError:
        source._cancelled()
        raise
    finally:
        state.leave(token, watch)
        # The traceback of an exception holds this frame. The transfer must not live as long: a receive is left posted for
        # the next one when its transfer goes.
        del source


async def next_of(arrival):
    try:
        return await wait(arrival)
    except PeerGoneError:
        raise StopAsyncIteration from None


async def connect_async(
    address: str | tuple[str, int], on: Domain | Worker | None = None, private_data: bytes = b"", **options: Any
) -> Connection:
    """Like ``connect``, for asyncio. The handshake waits on a thread; transfers do not.

    If the task is cancelled, the thread goes on until its timeout, and its connection is dropped.
    """
    import asyncio

    return await asyncio.to_thread(_native.connect, address, on, private_data, **options)


async def accept_async(
    incoming: Incoming, on: Domain | Worker, private_data: bytes = b"", **options: Any
) -> Connection:
    """Like ``incoming.accept``, for asyncio. The handshake waits on a thread; transfers do not."""
    import asyncio

    return await asyncio.to_thread(incoming.accept, on, private_data, **options)
