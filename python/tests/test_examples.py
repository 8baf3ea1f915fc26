"""The programs of examples/ and the README's, each end in a process of its own."""

import os
import pathlib
import re
import runpy
import subprocess
import sys
import time

import pytest

import dmabuf_rdma as rdma
from conftest import ADDRESS, Child

PYTHON = pathlib.Path(__file__).resolve().parents[1]
EXAMPLES = PYTHON / "examples"


def until_it_listens(address, listening):
    """Waits until the kernel has a listener at an address: a request that comes earlier is repeated after 20 s and more."""
    shown = ["rdma", "resource", "show", "cm_id"]
    while f"src-addr {address}" not in subprocess.run(shown, capture_output=True, text=True, check=True).stdout:
        assert listening(), "the listening end has ended"
        time.sleep(0.1)


def program(file, *words):
    """Runs an example in this process, a child that has its imports already."""
    sys.argv = [str(file), *words]
    try:
        runpy.run_path(str(file), run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise


def both(file, address, first, second):
    """Runs the two ends, and returns what they printed."""
    listening = Child(lambda: program(file, *first))
    until_it_listens(address, listening.runs)
    other = Child(lambda: program(file, *second))
    return other.result() + listening.result()


def test_the_readme(tmp_path):
    """As a user runs it: two programs."""
    blocks = re.findall(r"```python\n(.*?)```", (PYTHON / "README.md").read_text(), re.S)
    [text] = [block for block in blocks if "def decode" in block]
    lines = [line for line in text.splitlines() if line and not line.startswith(("import", "{", "LAYERS", "WANTED"))]
    assert len(lines) <= 30, "the README promises 30 lines"
    file = tmp_path / "readme.py"
    file.write_text(text)
    address = ADDRESS["rxe1"] + ":7470"
    ends = [subprocess.Popen([sys.executable, file, "decode", address])]
    try:
        until_it_listens(address, lambda: ends[0].poll() is None)
        ends.append(subprocess.Popen([sys.executable, file, "prefill", address]))
        assert [end.wait(timeout=240) for end in ends] == [0, 0]
    finally:
        for end in ends:
            end.kill()
            end.wait()


def test_kv_cache():
    words = ["--device", "rxe0", "--peer-device", "rxe1", "--layers", "3", "--pages", "50"]
    said = Child(lambda: program(EXAMPLES / "kv_cache.py", *words)).result()
    assert "3 layers of 50 pages, verified" in said, said


def test_checkpoint():
    address = ADDRESS["rxe1"] + ":7472"
    said = both(EXAMPLES / "checkpoint.py", address, ["store", address], ["train", address])
    assert "restored 4 arrays" in said and "kept 4 arrays" in said


def test_parameter_server():
    address = ADDRESS["rxe1"] + ":7473"
    said = both(EXAMPLES / "parameter_server.py", address, ["serve", address], ["work", address])
    assert "served 4 workers for 5 steps, verified" in said and "4 workers have done 5 steps" in said


def test_doctor(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "dmabuf-rdma").symlink_to(os.environ["DMABUF_RDMA_PROGRAM"])
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    found = rdma.doctor()
    assert found["schema"] == 1 and found["grade"] in ("A", "B") and found["summary"], found["summary"]
    assert [device["name"] for device in found["facts"]["devices"]] == ["rxe0", "rxe1"]
    assert all(finding["cause"] and finding["remedy"] for finding in found["findings"])


def test_a_doctor_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(rdma.NotFoundError, match="dmabuf-rdma is not in PATH") as missing:
        rdma.doctor()
    assert missing.value.errno == 2 and "cargo install" in missing.value.hint
    with pytest.raises(rdma.NotFoundError, match="/nowhere is not there"):
        rdma.doctor("/nowhere")
    other = tmp_path / "other"
    other.write_text("#!/bin/sh\necho no such command >&2\nexit 2\n")
    other.chmod(0o755)
    with pytest.raises(rdma.SystemCallError, match="status 2 and no answer: no such command"):
        rdma.doctor(other)
    other.write_text("#!/bin/sh\nexec /bin/sleep 60\n")
    with pytest.raises(rdma.TimeoutError, match="has not ended within 0.1 s"):
        rdma.doctor(other, timeout=0.1)
