"""Access flags of a region."""

import enum


class Access(enum.IntFlag, boundary=enum.KEEP):
    """What the device and peers may do with a region. The device may always read.

    The values are those of libibverbs (``ibv_access_flags``). ``Access.REMOTE`` is all access of a peer, and
    ``LOCAL_WRITE``.
    """

    NONE = 0
    LOCAL_WRITE = 1
    """The device may write: the region can be the target of receives and READs."""
    REMOTE_WRITE = 1 << 1
    """A peer may write. Needs ``LOCAL_WRITE``."""
    REMOTE_READ = 1 << 2
    """A peer may read."""
    REMOTE_ATOMIC = 1 << 3
    """A peer may execute atomics. Needs ``LOCAL_WRITE``."""
    RELAXED_ORDERING = 1 << 20
    """The device may reorder its PCIe writes."""
    REMOTE = LOCAL_WRITE | REMOTE_WRITE | REMOTE_READ | REMOTE_ATOMIC
    """All access of a peer, and ``LOCAL_WRITE``."""
