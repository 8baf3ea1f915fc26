"""NIXL with its UCX backend: lists of descriptors that are prepared once."""

import base64
import os
import time

import side

os.environ["UCX_NET_DEVICES"] = side.device + ":1"

import numpy
from nixl_cu12._api import nixl_agent, nixl_agent_config

agent = nixl_agent(side.role, nixl_agent_config(backends=["UCX"]))
agent.register_memory([(start, length, 0, "") for start, length in side.parts], "DRAM")
side.say(base64.b64encode(agent.get_agent_metadata()).decode() + " " + str(side.address))
metadata, address = side.hear().split()
peer = agent.add_remote_agent(base64.b64decode(metadata))


def rows(addresses):
    return [(int(address), side.size, 0) for address in addresses]


if side.near:
    theirs = int(address) + numpy.fromfile(os.environ["FAR_TABLE"], dtype=numpy.uint64)
    local = agent.prep_xfer_dlist("NIXL_INIT_AGENT", rows(side.blocks), "DRAM")
    remote = agent.prep_xfer_dlist(peer, rows(theirs), "DRAM")
    indices = numpy.arange(len(side.blocks), dtype=numpy.int32)


def write():
    transfer = agent.make_prepped_xfer("WRITE", local, indices, remote, indices, b"")
    start = time.perf_counter()
    state = agent.transfer(transfer)
    while state == "PROC":
        state = agent.check_xfer_state(transfer)
    seconds = time.perf_counter() - start
    if state != "DONE":
        raise SystemExit("the transfer ended with " + state)
    agent.release_xfer_handle(transfer)
    return seconds


side.serve(write)
