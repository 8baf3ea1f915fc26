"""Pushes the pages of a request from a prefill process to a decode process, layer by layer, and verifies them.

    python kv_cache.py --device rxe0 --peer-device rxe1

The two processes exchange what they need over a pipe: an endpoint, the description of the cache, and the pages. The
pages lie scattered on both sides. On two hosts a socket, MPI or etcd carries the same bytes.
"""

import argparse
import hashlib
import multiprocessing
import time

import numpy as np

import dmabuf_rdma as rdma


def decode(options, pipe):
    """Owns a cache of twice the pages, and checks each layer as soon as it has come."""
    domain = rdma.Domain(options.peer_device)
    cache = rdma.HostBuffer(options.layers * 2 * options.pages * options.page_size)
    region = domain.register(cache, rdma.Access.REMOTE)
    connection = domain.connection(notifications=options.layers)
    pages = np.random.default_rng(7).permutation(2 * options.pages)[: options.pages]
    pipe.send((connection.endpoint, region.remote(), pages))
    connection.connect(pipe.recv())
    pipe.send("connected")
    layers = cache.numpy("uint8", (options.layers, 2 * options.pages, options.page_size))
    for layer in range(options.layers):
        connection.notifications.wait(layer, timeout=60)
        digest = hashlib.sha256(layers[layer, pages]).digest()
        connection.notify(layer, digest).wait(timeout=60)


def prefill(options, pipe):
    """Computes layers, and starts to write each while it computes the next."""
    domain = rdma.Domain(options.device)
    cache = np.empty((options.layers, options.pages, options.page_size), np.uint8)
    region = domain.register(cache)
    connection = domain.connection(notifications=options.layers)
    endpoint, remote, theirs = pipe.recv()
    pipe.send(connection.endpoint)
    connection.connect(endpoint)
    pipe.recv()
    size = options.page_size
    ours = region.strided(size, size, options.layers * options.pages)
    table = remote.strided(size, size, options.layers * 2 * options.pages)
    random, writing = np.random.default_rng(1), []
    start = time.perf_counter()
    for layer in range(options.layers):
        cache[layer] = random.integers(0, 256, cache[layer].shape, np.uint8)
        here = np.arange(layer * options.pages, (layer + 1) * options.pages)
        there = layer * 2 * options.pages + theirs
        writing.append(connection.write_notify(ours.select(here), table.select(there), layer))
    for transfer in writing:
        transfer.wait(timeout=60)
    took = time.perf_counter() - start
    for layer in range(options.layers):
        answer = connection.notifications.take(timeout=60)
        if (answer.id, answer.payload) != (layer, hashlib.sha256(cache[layer]).digest()):
            raise SystemExit(f"layer {layer} arrived with other bytes")
    blocks = options.layers * options.pages
    print(f"pushed {options.layers} layers of {options.pages} pages, verified: {blocks / took:.0f} pages/s")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", required=True, help="the RDMA device of the prefill process")
    parser.add_argument("--peer-device", required=True, help="that of the decode process")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--pages", type=int, default=256, help="pages of the request in each layer")
    parser.add_argument("--page-size", type=int, default=16 << 10, help="bytes of a page")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    decoder = context.Process(target=decode, args=(options, there))
    decoder.start()
    there.close()
    prefill(options, here)
    decoder.join()
    raise SystemExit(decoder.exitcode)


if __name__ == "__main__":
    main()
