"""One side of the protocol of examples/kv_cache, in Python: peer.py decode|prefill HOST PORT LAYERS PAGES PAGE_SIZE"""

import sys

import numpy as np
import xxhash

import dmabuf_rdma as rdma

SPARE = 2
role, host, *numbers = sys.argv[1:]
port, layers, pages, size = map(int, numbers)


def contents(layer, at):
    """The bytes of a page, as examples/kv_cache/cache.rs computes them."""
    with np.errstate(over="ignore"):
        seed = np.uint64(layer << 32 | at) * np.uint64(0x9E37_79B9_7F4A_7C15) | np.uint64(1)
        return (seed * (np.arange(1, size // 8 + 1, dtype=np.uint64) * np.uint64(2) + np.uint64(1))).view(np.uint8)


def digest(array):
    return xxhash.xxh64(array).intdigest().to_bytes(8, "little")


def decode():
    listener = rdma.Listener((host, port))
    print("listening", flush=True)
    incoming = listener.accept(timeout=60)
    domain = rdma.Domain(incoming.device)
    cache = np.zeros((layers, SPARE * pages, size), np.uint8)
    region = domain.register(cache, rdma.Access.REMOTE)
    connection = incoming.accept(domain, bytes(region.remote()), notifications=layers + 1, timeout=60)
    chosen = np.random.default_rng(2).permutation(SPARE * pages)[:pages].astype("<u4")
    connection.send(domain.register(chosen)).wait(timeout=60)
    for layer in range(layers):
        connection.notifications.wait(layer, timeout=60)
        came = cache[layer, chosen]
        assert (came == [contents(layer, at) for at in range(pages)]).all()
        connection.notify(layer, digest(came)).wait(timeout=60)
    print(f"received {layers} layers of {pages} pages, verified")


def prefill():
    connection = rdma.connect((host, port), notifications=layers + 1, timeout=60)
    remote, _ = rdma.RemoteRegion.split_from(connection.private_data)
    cache, told = np.zeros((layers, pages, size), np.uint8), np.zeros(pages, "<u4")
    region = connection.domain.register(cache)
    connection.recv(connection.domain.register(told, rdma.Access.LOCAL_WRITE), timeout=60).wait()
    ours = region.strided(size, size, layers * pages)
    theirs = remote.strided(size, size, layers * pages * SPARE)
    for layer in range(layers):
        cache[layer] = [contents(layer, at) for at in range(pages)]
        here, there = np.arange(pages) + layer * pages, told.astype(np.int64) + layer * pages * SPARE
        connection.write_notify(ours.select(here), theirs.select(there), layer).wait(timeout=60)
    for layer in range(layers):
        answer = connection.notifications.take(timeout=60)
        assert (answer.id, answer.payload) == (layer, digest(cache[layer]))
    print(f"pushed {layers} layers of {pages} pages, verified")


{"decode": decode, "prefill": prefill}[role]()
