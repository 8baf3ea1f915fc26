"""Mooncake's transfer engine with its RDMA transport: one synchronous call for a batch of blocks."""

import os
import time

import numpy
import side
from mooncake.engine import TransferEngine

engine = TransferEngine()
if engine.initialize("127.0.0.1", "P2PHANDSHAKE", "rdma", side.device) != 0:
    raise SystemExit("the engine does not start on " + side.device)
if any(engine.register_memory(start, length) != 0 for start, length in side.parts):
    raise SystemExit("the engine does not register the memory")
side.say("127.0.0.1:%d %d" % (engine.get_rpc_port(), side.address))
peer, address = side.hear().split()
if side.near:
    local = [int(block) for block in side.blocks]
    table = numpy.fromfile(os.environ["FAR_TABLE"], dtype=numpy.uint64)
    remote = [int(address) + int(offset) for offset in table]
    lengths = [side.size] * len(local)


def write():
    start = time.perf_counter()
    code = engine.batch_transfer_sync_write(peer, local, remote, lengths)
    seconds = time.perf_counter() - start
    if code != 0:
        raise SystemExit("the transfer ended with %d" % code)
    return seconds


side.serve(write)
