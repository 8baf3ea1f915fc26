"""Fixtures of the tests, which run in a guest with the devices rxe0 and rxe1: ``cargo xtask test python``."""

import contextlib
import gc
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from multiprocessing import resource_tracker

import numpy as np
import pytest

import dmabuf_rdma as rdma

TESTS = pathlib.Path(__file__).parent
# The devices' addresses in the guest.
ADDRESS = {"rxe0": "192.168.77.1", "rxe1": "192.168.77.2"}


def pytest_collection_finish(session):
    print(f"\nrunning {len(session.items)} tests", flush=True)


def pytest_runtest_logreport(report):
    """Prints what Rust's test harness prints, for xtask: one line for each test, which failed if its teardown did."""
    seen = pytest_runtest_logreport.__dict__
    name = "python::" + report.nodeid.removeprefix("tests/").removeprefix("python/tests/")
    if report.failed or report.skipped:
        seen[name] = "FAILED"
    if report.when == "teardown":
        print(f"\ntest {name} ... {seen.setdefault(name, 'ok')}", flush=True)


def pytest_sessionfinish():
    verdicts = list(pytest_runtest_logreport.__dict__.values())
    failed = verdicts.count("FAILED")
    passed = len(verdicts) - failed
    word = "FAILED" if failed else "ok"
    print(f"\ntest result: {word}. {passed} passed; {failed} failed; 0 ignored; 0 measured; 0 filtered out", flush=True)


def held():
    """What the process holds: descriptors, regions, bytes in regions, dma-bufs."""
    gc.collect()
    gauges = rdma.gauges()
    return len(os.listdir("/proc/self/fd")), gauges["regions"], gauges["bytes"], gauges["fds"]


@pytest.fixture(scope="session", autouse=True)
def warm():
    """What stays open as long as the process lives: librdmacm's descriptors of each device, and multiprocessing's."""
    resource_tracker.ensure_running()
    listener = rdma.Listener((ADDRESS["rxe1"], 0))
    accepting = threading.Thread(target=lambda: listener.accept(timeout=60).accept(rdma.Domain("rxe1")))
    accepting.start()
    rdma.connect(listener.address, timeout=60)
    accepting.join()


@pytest.fixture(scope="session", autouse=True)
def jax_process(request, tmp_path_factory):
    """Starts the test of JAX, and returns what waits for its end."""
    if not any(item.name == "test_jax_arrays" for item in request.session.items):
        return None
    said = tmp_path_factory.mktemp("jax") / "said"
    code = "import test_register; test_register.jax_arrays()"
    with said.open("w") as file:
        process = subprocess.Popen([sys.executable, "-c", code], cwd=TESTS, stdout=file, stderr=file)

    def ended():
        assert process.wait(timeout=300) == 0, said.read_text()

    return ended


@pytest.fixture(autouse=True)
def nothing_left(warm, request):
    before = held()
    yield
    # The test's fixtures are done, and pytest holds them still.
    request.node.funcargs.clear()
    assert held() == before, "descriptors, regions, their bytes and dma-bufs are given back"


@pytest.fixture
def domain():
    return rdma.Domain("rxe0")


class Pair:
    """Two connected ends, on the two devices of the guest's wire."""

    def __init__(self, **options):
        self.near_domain, self.far_domain = rdma.Domain("rxe0"), rdma.Domain("rxe1")
        self.near = self.near_domain.connection(**options)
        self.far = self.far_domain.connection(**options)
        near, far = self.near.endpoint, self.far.endpoint
        self.near.connect(rdma.Endpoint.from_bytes(bytes(far)))
        self.far.connect(rdma.Endpoint.from_bytes(bytes(near)))

    def memory(self, nbytes=1 << 16):
        """An array and its region on the near side, and on the far side."""
        ours, theirs = np.zeros(nbytes, np.uint8), np.zeros(nbytes, np.uint8)
        near = self.near_domain.register(ours, rdma.Access.REMOTE)
        far = self.far_domain.register(theirs, rdma.Access.REMOTE)
        return ours, near, theirs, far


@pytest.fixture
def pair():
    return Pair()


@pytest.fixture
def notified():
    return Pair(notifications=64)


def filled(nbytes, seed=1):
    """Bytes that differ from place to place."""
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


class Child:
    """A function in a child of fork, which begins with what is imported here."""

    def __init__(self, call):
        self.said, self.status = tempfile.TemporaryFile("w+"), None
        self.pid = os.fork()
        if self.pid > 0:
            return
        code = 1
        try:
            with contextlib.redirect_stdout(self.said):
                call()
            code = 0
        except BaseException:  # noqa: BLE001
            traceback.print_exc(file=self.said)
        finally:
            self.said.flush()
            os._exit(code)

    def runs(self):
        if self.status is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = status if ended else None
        return self.status is None

    def result(self):
        """Fails as the function fails, and returns what it printed."""
        with self.said:
            if self.status is None:
                self.status = os.waitpid(self.pid, 0)[1]
            self.said.seek(0)
            text = self.said.read()
            assert self.status == 0, text
            return text


def threads():
    """The names of this process's threads."""
    for task in pathlib.Path("/proc/self/task").iterdir():
        # It may have ended since.
        with contextlib.suppress(OSError):
            yield (task / "comm").read_text().strip()


def until_no_thread_connects():
    """Waits for the native threads of handshakes that nobody waits for any more."""
    end = time.monotonic() + 60
    while any(name.startswith("dmabuf_rdma con") for name in threads()):
        assert time.monotonic() < end, "a handshake goes on after its timeout"
        time.sleep(0.05)
