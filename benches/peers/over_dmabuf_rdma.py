"""This library from Python: two tables, and one call that writes the blocks of one to those of the other."""

import os
import time

import dmabuf_rdma
import numpy
import side

WINDOW, CHAIN = 128, 16

domain = dmabuf_rdma.Domain(side.device)
region = domain.register(side.mapping, dmabuf_rdma.Access.REMOTE)
polling = os.environ["POLLING"] == "1"
connection = domain.connection(window=WINDOW, chain=CHAIN, busy_poll=polling)
side.say(bytes(connection.endpoint).hex() + " " + bytes(region.remote()).hex())
endpoint, described = map(bytes.fromhex, side.hear().split())
connection.connect(dmabuf_rdma.Endpoint.from_bytes(endpoint))
if side.near:
    local = region.blocks(side.size, side.offsets)
    theirs = numpy.fromfile(os.environ["FAR_TABLE"], dtype=numpy.uint64)
    remote = dmabuf_rdma.RemoteRegion.from_bytes(described).blocks(side.size, theirs)


def write():
    start = time.perf_counter()
    connection.write(local, remote).wait()
    return time.perf_counter() - start


side.serve(write)
