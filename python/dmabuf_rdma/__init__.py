"""A tensor to a registered RDMA region in one call, and transfers of it.

An RDMA device (NIC) reads and writes registered memory in place, without a copy. The path:

1. ``domain = Domain("mlx5_0")`` opens a device. ``devices()`` lists them.
2. ``region = domain.register(tensor, Access.REMOTE)`` registers what you have: numpy, PyTorch, JAX and CuPy arrays on
   the CPU or a GPU, a ``HostBuffer``, or a ``DmaBuf`` of ``udmabuf``, ``heap``, or a descriptor.
3. ``connection = connect("192.0.2.1:7471")``, or ``Listener(…).accept().accept(domain)`` on the other side; or exchange
   ``bytes(connection.endpoint)`` by any means.
4. ``bytes(region.remote())`` describes memory to the peer: ``RemoteRegion.from_bytes``.
5. ``connection.write(region[:4096], remote[4096:8192]).wait()``, or ``await`` it. ``read``, ``send``, ``recv``, and
   ``write_notify``, which tells the peer that the bytes have come: ``connection.notifications``.
6. Thousands of scattered blocks go in one call: ``region.strided(…)``, ``table.select(indices)``.

Lengths and offsets are bytes, times are seconds. Every failure is an ``Error`` with a class for its kind; wrong types are
``TypeError``. Calls that wait release the GIL, and KeyboardInterrupt ends them. ``doctor()`` says what works on this
machine.

Whoever uses memory holds it: a region holds the array that was registered, a transfer holds its region, and the memory
stays until the device is done.
"""

try:
    from . import _native
except ImportError as _error:
    if "libibverbs" not in str(_error):
        raise
    raise ImportError(
        "dmabuf_rdma needs libibverbs of rdma-core 32 or later, which this machine lacks: install it with its providers "
        "(Debian, Ubuntu: apt install libibverbs1 ibverbs-providers librdmacm1; Fedora, RHEL: dnf install libibverbs "
        "librdmacm)"
    ) from _error

from ._access import Access
from ._aio import accept_async, connect_async
from ._doctor import doctor
from ._errors import (
    AccessError,
    BusyError,
    CancelledError,
    DeviceGoneError,
    Error,
    InvalidDataError,
    LimitError,
    MisuseError,
    NotFoundError,
    OutOfMemoryError,
    PeerGoneError,
    SystemCallError,
    TimeoutError,
    TransportError,
    UnsupportedError,
)
from ._native import (
    Arrival,
    Blocks,
    Connection,
    CpuAccess,
    DmaBuf,
    Domain,
    Endpoint,
    HostBuffer,
    Incoming,
    Listener,
    Notification,
    Notifications,
    Region,
    RemoteBlocks,
    RemoteRegion,
    Transfer,
    Worker,
    __version__,
    connect,
    devices,
    dumb_buffer,
    gauges,
    heap,
    udmabuf,
)

__all__ = [
    "Access",
    "AccessError",
    "Arrival",
    "Blocks",
    "BusyError",
    "CancelledError",
    "Connection",
    "CpuAccess",
    "DeviceGoneError",
    "DmaBuf",
    "Domain",
    "Endpoint",
    "Error",
    "HostBuffer",
    "Incoming",
    "InvalidDataError",
    "LimitError",
    "Listener",
    "MisuseError",
    "NotFoundError",
    "Notification",
    "Notifications",
    "OutOfMemoryError",
    "PeerGoneError",
    "Region",
    "RemoteBlocks",
    "RemoteRegion",
    "SystemCallError",
    "TimeoutError",
    "Transfer",
    "TransportError",
    "UnsupportedError",
    "Worker",
    "__version__",
    "accept_async",
    "connect",
    "connect_async",
    "devices",
    "doctor",
    "dumb_buffer",
    "gauges",
    "heap",
    "udmabuf",
]
