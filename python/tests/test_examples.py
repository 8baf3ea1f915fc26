"""The programs of examples/ and the README's, each end in a process of its own."""

import pathlib
import re
import subprocess
import sys
import time

from conftest import ADDRESS

PYTHON = pathlib.Path(__file__).resolve().parents[1]


def listens(process):
    """Whether a process has a listener: it holds librdmacm's device."""
    fds = pathlib.Path(f"/proc/{process.pid}/fd")
    try:
        return any(str(fd.readlink()) == "/dev/infiniband/rdma_cm" for fd in fds.iterdir())
    except FileNotFoundError:
        return False


def both(program, first, second):
    """Starts the listening end, and the other one once it listens."""
    run = lambda words: subprocess.Popen(  # noqa: E731
        [sys.executable, str(program), *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    listening = run(first)
    try:
        while listening.poll() is None and not listens(listening):
            time.sleep(0.1)
        # From the device to the listener it is a few calls.
        time.sleep(1)
        other = run(second)
        said = other.communicate(timeout=240)[0]
        heard = listening.communicate(timeout=120)[0]
        assert (other.returncode, listening.returncode) == (0, 0), said + heard
        return said + heard
    finally:
        listening.kill()
        listening.wait()


def test_the_readme(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (PYTHON / "README.md").read_text(), re.S)
    [program] = [block for block in blocks if "def decode" in block]
    lines = [line for line in program.splitlines() if line and not line.startswith(("import", "{", "LAYERS", "WANTED"))]
    assert len(lines) <= 30, "the README promises 30 lines"
    file = tmp_path / "readme.py"
    file.write_text(program)
    address = ADDRESS["rxe1"] + ":7470"
    both(file, ["decode", address], ["prefill", address])


def test_kv_cache():
    program = PYTHON / "examples" / "kv_cache.py"
    words = ["--device", "rxe0", "--peer-device", "rxe1", "--layers", "3", "--pages", "50"]
    done = subprocess.run([sys.executable, str(program), *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "3 layers of 50 pages, verified" in done.stdout, done.stdout + done.stderr


def test_checkpoint():
    address = ADDRESS["rxe1"] + ":7472"
    said = both(PYTHON / "examples" / "checkpoint.py", ["store", address], ["train", address])
    assert "restored 4 arrays" in said and "kept 4 arrays" in said


def test_parameter_server():
    address = ADDRESS["rxe1"] + ":7473"
    said = both(PYTHON / "examples" / "parameter_server.py", ["serve", address], ["work", address])
    assert "served 4 workers for 5 steps, verified" in said
