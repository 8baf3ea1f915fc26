"""A side of a Python peer: its memory, its table of blocks, and the lines that it exchanges with the benchmark.

Arguments: device, role (`near` writes, `far` is written), bytes of a block, memory (a path), table (a path).
"""

import mmap
import os
import sys

import numpy

device, role, size, memory, table = sys.argv[1:]
near = role == "near"
size = int(size)

# The file must stay mapped until the process ends, so this holds it.
_file = os.open(memory, os.O_RDWR)
mapping = numpy.frombuffer(mmap.mmap(_file, 0), dtype=numpy.uint8)
address = mapping.ctypes.data
length = mapping.nbytes
# Where the blocks of this side are, in the memory and in this process.
offsets = numpy.fromfile(table, dtype=numpy.uint64)
blocks = address + offsets

# What to register: soft-RoCE on some kernels takes less than 1 GiB of host memory as one region.
_part = (1 << 29) // size * size
parts = [(address + at, min(_part, length - at)) for at in range(0, length, _part)]


def say(text):
    """A line for the benchmark; libraries print others."""
    print("=", text, flush=True)


def hear():
    """A line from the benchmark. Ends the process without clean-up if there is none: NIXL crashes in it."""
    line = sys.stdin.readline()
    if not line:
        os._exit(0)
    return line.strip()


def serve(write):
    """Connected: the near side writes when it is told to, and says how many seconds that took."""
    say("ready")
    while True:
        hear()
        say(repr(write()))
