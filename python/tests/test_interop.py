"""A peer in Rust, the example kv_cache, with one in Python, both ways."""

import os
import subprocess

import numpy as np
import pytest
import xxhash

import dmabuf_rdma as rdma
from conftest import ADDRESS

LAYERS, PAGES, PAGE = 3, 24, 4096
# The decode worker of the example has so many times the pages.
SPARE = 2


@pytest.fixture(scope="module")
def example():
    """The program, which xtask has built."""
    return os.environ["DMABUF_RDMA_KV_CACHE"]


def contents(layer, at):
    """The bytes of a page, as examples/kv_cache/cache.rs computes them."""
    with np.errstate(over="ignore"):
        seed = np.uint64(layer << 32 | at) * np.uint64(0x9E37_79B9_7F4A_7C15) | np.uint64(1)
        words = np.arange(1, PAGE // 8 + 1, dtype=np.uint64)
        return (seed * (np.uint64(2) * words + np.uint64(1))).view(np.uint8)


def start(example, role, *words):
    options = ["--port", "7480", "--layers", str(LAYERS), "--pages", str(PAGES), "--page-size", str(PAGE)]
    return subprocess.Popen([example, role, *words, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_python_pushes_to_rust(example):
    decoder = start(example, "decode", "--listen", ADDRESS["rxe1"])
    try:
        assert decoder.stdout.readline().startswith("listening")
        connection = rdma.connect((ADDRESS["rxe1"], 7480), notifications=LAYERS + 1, timeout=60)
        remote, _ = rdma.RemoteRegion.split_from(connection.private_data)
        cache, told = np.zeros((LAYERS, PAGES, PAGE), np.uint8), np.zeros(PAGES, "<u4")
        region = connection.domain.register(cache)
        connection.recv(connection.domain.register(told, rdma.Access.LOCAL_WRITE), timeout=60).wait()
        pages = region.strided(PAGE, PAGE, LAYERS * PAGES)
        theirs = remote.strided(PAGE, PAGE, LAYERS * PAGES * SPARE)
        for layer in range(LAYERS):
            for at in range(PAGES):
                cache[layer, at] = contents(layer, at)
            here = pages.select(np.arange(PAGES) + layer * PAGES)
            there = theirs.select(told.astype(np.int64) + layer * PAGES * SPARE)
            connection.write_notify(here, there, layer).wait(timeout=60)
        for layer in range(LAYERS):
            answer = connection.notifications.take(timeout=60)
            assert (answer.id, answer.payload) == (layer, xxhash.xxh64(cache[layer]).intdigest().to_bytes(8, "little"))
        said = decoder.communicate(timeout=60)[0]
        assert decoder.returncode == 0 and f"received {LAYERS} layers of {PAGES} pages, verified" in said, said
    finally:
        decoder.kill()
        decoder.communicate()


def test_rust_pushes_to_python(example):
    listener = rdma.Listener((ADDRESS["rxe1"], 7480))
    prefill = start(example, "prefill", "--connect", ADDRESS["rxe1"])
    try:
        incoming = listener.accept(timeout=60)
        domain = rdma.Domain(incoming.device)
        cache = rdma.udmabuf(LAYERS * PAGES * SPARE * PAGE)
        region = domain.register(cache, rdma.Access.REMOTE)
        connection = incoming.accept(domain, bytes(region.remote()), notifications=LAYERS + 1, timeout=60)
        chosen = np.random.default_rng(2).permutation(PAGES * SPARE)[:PAGES].astype("<u4")
        connection.send(domain.register(chosen)).wait(timeout=60)
        layers = cache.numpy("uint8", (LAYERS, PAGES * SPARE, PAGE))
        for layer in range(LAYERS):
            connection.notifications.wait(layer, timeout=60)
            with cache.cpu_access("r"):
                pages = layers[layer, chosen]
            assert (pages == [contents(layer, at) for at in range(PAGES)]).all()
            digest = xxhash.xxh64(pages).intdigest().to_bytes(8, "little")
            connection.notify(layer, digest).wait(timeout=60)
        said = prefill.communicate(timeout=60)[0]
        assert prefill.returncode == 0 and f"pushed {LAYERS} layers of {PAGES} pages" in said, said
    finally:
        prefill.kill()
        prefill.communicate()
