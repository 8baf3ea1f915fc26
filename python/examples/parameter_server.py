"""A parameter server for many workers, and its workers, in asyncio.

    python parameter_server.py serve 192.0.2.1:7473 --workers 4
    python parameter_server.py work 192.0.2.1:7473 --workers 4

The parameters and a slot for the gradient of each worker are memory of the server that its clients reach. A worker reads
the parameters, computes, writes its gradient into its slot, and notifies. The server adds up the gradients of a step,
and notifies all. No task has a thread: one descriptor wakes the loop for all of them.
"""

import argparse
import asyncio

import numpy as np

import dmabuf_rdma as rdma

STEPS, SIZE = 5, 1 << 14


async def serve(options):
    listener = rdma.Listener(options.address)
    request = await listener.accept_async()
    domain = rdma.Domain(request.device)
    worker = domain.worker(notifications=64)
    memory = np.zeros((1 + options.workers, SIZE), np.float32)
    region = domain.register(memory, rdma.Access.REMOTE)
    row = memory[0].nbytes
    clients = []
    for at in range(options.workers):
        if at > 0:
            request = await listener.accept_async()
        slot = region[(1 + at) * row : (2 + at) * row]
        data = bytes(region[:row].remote()) + bytes(slot.remote())
        clients.append(await rdma.accept_async(request, worker, data))
    for step in range(STEPS):
        # All gradients of the step have come.
        await worker.notifications.arrived(step, options.workers)
        memory[0] += memory[1:].sum(axis=0)
        await asyncio.gather(*(client.notify(step) for client in clients))
    for client in clients:
        await client.notifications.arrived(STEPS)
    expected = STEPS * options.workers * (options.workers + 1) / 2
    if not (memory[0] == expected).all():
        raise SystemExit("the parameters are wrong")
    print(f"served {options.workers} workers for {STEPS} steps, verified")


async def work(options, number):
    connection = await rdma.connect_async(options.address, notifications=8)
    parameters, rest = rdma.RemoteRegion.split_from(connection.private_data)
    slot, _ = rdma.RemoteRegion.split_from(rest)
    ours, gradient = np.zeros(SIZE, np.float32), np.zeros(SIZE, np.float32)
    here = connection.domain.register(ours, rdma.Access.LOCAL_WRITE)
    there = connection.domain.register(gradient)
    for step in range(STEPS):
        await connection.read(here, parameters)
        gradient[:] = number + 1
        await connection.write_notify(there, slot, step)
        await connection.notifications.arrived(step)
    await connection.notify(STEPS)


async def workers(options):
    async with asyncio.TaskGroup() as group:
        for number in range(options.workers):
            group.create_task(work(options, number))
    print(f"{options.workers} workers have done {STEPS} steps")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("role", choices=["serve", "work"])
    parser.add_argument("address", help="host:port of the server")
    parser.add_argument("--workers", type=int, default=4)
    options = parser.parse_args()
    asyncio.run((serve if options.role == "serve" else workers)(options))


if __name__ == "__main__":
    main()
