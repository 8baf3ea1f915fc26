"""Stores a checkpoint, a dict of arrays, in the memory of a peer, and restores it from there.

    python checkpoint.py store 192.0.2.1:7472       # keeps checkpoints
    python checkpoint.py train 192.0.2.1:7472       # writes one, changes its arrays, and reads it back

The client says in a message what it has. The store allocates one buffer and replies with its description. Then each array
is written to its place in it, all of them at once, in place and of any type and size.
"""

import json
import sys

import numpy as np

import dmabuf_rdma as rdma

ALIGN = 64
MESSAGE = 64 << 10


def layout(arrays):
    """Where each array lies in the checkpoint, and the length of all."""
    places, offset = {}, 0
    for name, array in arrays.items():
        places[name] = (offset, array.nbytes)
        offset += -(-array.nbytes // ALIGN) * ALIGN
    return places, offset


def say(connection, box, text):
    """Sends a message of a fixed length."""
    memory, region = box
    memory[:] = 0
    memory[: len(text)] = np.frombuffer(text, np.uint8)
    connection.send(region).wait(timeout=60)


def message_box(domain):
    memory = np.zeros(MESSAGE, np.uint8)
    return memory, domain.register(memory, rdma.Access.LOCAL_WRITE)


def store(address):
    listener = rdma.Listener(address)
    request = listener.accept(timeout=60)
    domain = rdma.Domain(request.device)
    box = message_box(domain)
    connection = request.accept(domain)
    connection.recv(box[1]).wait(timeout=60)
    wanted = json.loads(bytes(box[0]).rstrip(b"\0"))
    checkpoint = rdma.HostBuffer(wanted["nbytes"], pages="transparent")
    region = domain.register(checkpoint, rdma.Access.REMOTE)
    say(connection, box, bytes(region.remote()))
    connection.recv(box[1]).wait(timeout=300)
    print(f"kept {len(wanted['arrays'])} arrays, {wanted['nbytes']} bytes: {bytes(box[0]).rstrip(bytes(1)).decode()}")


def train(address):
    random = np.random.default_rng(1)
    arrays = {
        "embedding": random.standard_normal((1000, 64), np.float32),
        "bias": np.arange(10, dtype=np.int64),
        "step": np.array(7),
        "mask": random.integers(0, 2, (33, 7)).astype(bool),
    }
    places, nbytes = layout(arrays)
    connection = rdma.connect(address)
    domain = connection.domain
    box = message_box(domain)
    replying = connection.recv(box[1])
    # `say` uses memory of its own: the receive is posted into the other one.
    say(connection, message_box(domain), json.dumps({"nbytes": nbytes, "arrays": places}).encode())
    replying.wait(timeout=60)
    remote, _ = rdma.RemoteRegion.split_from(bytes(box[0]))

    regions = {name: domain.register(array, rdma.Access.LOCAL_WRITE) for name, array in arrays.items()}

    def each(operation):
        for name, (offset, length) in places.items():
            yield operation(regions[name], remote[offset : offset + length])

    for transfer in list(each(connection.write)):
        transfer.wait(timeout=60)
    before = {name: array.copy() for name, array in arrays.items()}
    for array in arrays.values():
        array[...] = 0
    for transfer in list(each(connection.read)):
        transfer.wait(timeout=60)
    for name, array in arrays.items():
        if array.tobytes() != before[name].tobytes():
            raise SystemExit(f"{name} came back with other bytes")
    say(connection, message_box(domain), b"restored")
    print(f"stored and restored {len(arrays)} arrays, {nbytes} bytes, verified")


if __name__ == "__main__":
    roles = {"store": store, "train": train}
    if len(sys.argv) != 3 or sys.argv[1] not in roles:
        raise SystemExit(__doc__)
    roles[sys.argv[1]](sys.argv[2])
