"""The far end in another process, by fork and spawn; the end of a process with transfers in flight."""

import hashlib
import multiprocessing
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import dmabuf_rdma as rdma
from conftest import ADDRESS, filled

SIZE = 1 << 20


def serve(pipe):
    """Receives tables of blocks, and tells the digest of what has come."""
    domain = rdma.Domain("rxe1")
    memory = np.zeros(SIZE, np.uint8)
    region = domain.register(memory, rdma.Access.REMOTE)
    connection = domain.connection(notifications=16)
    table = region.remote().strided(1024, 2048, SIZE // 2048)
    pipe.send((connection.endpoint, region.remote(), table))
    connection.connect(pipe.recv())
    pipe.send("connected")
    connection.notifications.wait(1, timeout=60)
    pipe.send(hashlib.sha256(memory).hexdigest())
    # What this end has written, the other one reads.
    memory[:] = filled(SIZE, 8)
    connection.notify(2).wait(timeout=60)
    pipe.recv()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_the_far_end_is_another_process(method):
    context = multiprocessing.get_context(method)
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there,))
    process.start()
    there.close()
    endpoint, remote, table = here.recv()
    domain = rdma.Domain("rxe0")
    connection = domain.connection(notifications=16)
    here.send(connection.endpoint)
    connection.connect(endpoint)
    assert here.recv() == "connected"
    ours = filled(SIZE)
    region = domain.register(ours, rdma.Access.LOCAL_WRITE)
    chosen = np.random.default_rng(3).permutation(len(table))
    connection.write_notify(region.strided(1024, 2048, len(table)).select(chosen), table.select(chosen), 1).wait(timeout=60)
    expected = ours.reshape(-1, 2048).copy()
    expected[:, 1024:] = 0
    assert here.recv() == hashlib.sha256(expected).hexdigest()
    connection.notifications.wait(2, timeout=60)
    connection.read(region, remote).wait(timeout=60)
    assert (ours == filled(SIZE, 8)).all()
    here.send("done")
    process.join(60)
    assert process.exitcode == 0
    process.close()
    here.close()


def test_a_child_of_fork_leaves_its_parent_s_objects_alone(pair):
    ours, near, theirs, far = pair.memory(4096)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            pair.near.write(near, far.remote()).wait(timeout=5)
        except rdma.Error as refused:
            code = 0 if "parent" in str(refused) else 2
        finally:
            pair.near = pair.far = near = far = None
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    ours[:] = 5
    pair.near.write(near, far.remote()).wait(timeout=30)
    assert (theirs == 5).all()


ENDS = {
    "the main thread ends": "",
    "an exit": "sys.exit(0)",
    "the cycle is collected at the end": "cycle = [pair, transfers]; cycle.append(cycle)",
    "an attribute of a module": "sys.kept = (pair, transfers, near, far)",
    "a daemon thread waits": "threading.Thread(target=pair.far.recv(far[:8]).wait, daemon=True).start(); time.sleep(0.3)",
    "a task waits": """
import asyncio
async def main():
    async def one():
        await pair.far.recv(far[:8])
    asyncio.create_task(one())
    await asyncio.sleep(0.1)
asyncio.run(main())
""",
    "it is killed": "os._exit(0)",
}


PROGRAM = """
import os, sys, threading, time
import numpy as np
import dmabuf_rdma as rdma
from conftest import Pair

for name, end in {ends!r}.items():
    child = os.fork()
    if child == 0:
        break
    print(name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), sep=": ", flush=True)
else:
    sys.exit(0)
pair = Pair()
ours, near, theirs, far = pair.memory(4 << 20)
transfers = [pair.near.write(near, far.remote()) for _ in range(8)]
del ours, theirs
exec(end)
"""


def test_the_interpreter_ends_with_transfers_in_flight():
    """Each end in a child of one program, which has the imports."""
    command = [sys.executable, "-X", "dev", "-c", PROGRAM.format(ends=ENDS)]
    # The time only ends what hangs.
    done = subprocess.run(command, cwd=pathlib.Path(__file__).parent, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines() == [f"{name}: 0" for name in ENDS], (done.stdout, done.stderr)
    assert done.returncode == 0 and "Traceback" not in done.stderr and "Fatal" not in done.stderr, done.stderr


def test_a_missing_libibverbs_is_named(tmp_path):
    """The package's message in place of the loader's."""
    package = pathlib.Path(rdma.__file__).parent
    copy = tmp_path / "dmabuf_rdma"
    copy.mkdir()
    for file in package.iterdir():
        if file.suffix in (".py", ".so"):
            (copy / file.name).write_bytes(file.read_bytes())
    native = next(copy.glob("_native*.so"))
    # As on a machine without it: the loader finds no library of this name.
    native.write_bytes(native.read_bytes().replace(b"libibverbs.so.1\0", b"libibverbs.so.9\0"))
    done = subprocess.run(
        [sys.executable, "-c", "import dmabuf_rdma"], env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "apt install libibverbs1 ibverbs-providers" in done.stderr, done.stderr
