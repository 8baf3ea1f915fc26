"""Exceptions, by what a program can do about them."""

import builtins
import errno as _errno


class Error(Exception):
    """The base of all exceptions of this package.

    ``kind`` says what a program can do and never changes for a failure; each kind has a class of its own. The message
    says what failed, why if known, and what to do next. The library is the same for Rust, C and Python, and so are its
    words.

    Attributes:
        kind: the name of the kind, such as ``"Timeout"``.
        errno: the errno of the system call or the provider behind it; ``None`` if there is none.
        hint: what to do, in a sentence.
    """

    kind: str = "System"

    def __init__(self, message: str, errno: int | None = None, hint: str = "") -> None:
        super().__init__(message)
        self.errno = errno
        self.hint = hint

    def __reduce__(self):
        return type(self), (str(self), self.errno, self.hint)

    def __repr__(self):
        name = f", errno={_errno.errorcode.get(self.errno, self.errno)}" if self.errno else ""
        return f"{type(self).__name__}({str(self)!r}{name})"


class MisuseError(Error, ValueError):
    """The arguments cannot work, or not together: correct the program."""

    kind = "Misuse"


class InvalidDataError(Error, ValueError):
    """Data from outside, such as a peer's description, is damaged or inconsistent."""

    kind = "InvalidData"


class UnsupportedError(Error):
    """The device, its driver, the kernel or a library lacks the operation: choose another way."""

    kind = "Unsupported"


class NotFoundError(Error, LookupError):
    """A device, heap, library, address or pointer does not exist."""

    kind = "NotFound"


class AccessError(Error, PermissionError):
    """This user, or this object, lacks the permission."""

    kind = "Permission"


class LimitError(Error):
    """A limit that an administrator or the caller can raise: descriptors, locked memory, the cache's size."""

    kind = "Limit"


class OutOfMemoryError(Error, MemoryError):
    """The system or the device is out of memory."""

    kind = "OutOfMemory"


class BusyError(Error):
    """The object is in use: drop its other handles, then try again."""

    kind = "Busy"


class TimeoutError(Error, builtins.TimeoutError):  # noqa: A001
    """The timeout expired. It is a ``TimeoutError`` of Python too."""

    kind = "Timeout"


class CancelledError(Error):
    """The caller cancelled the operation."""

    kind = "Cancelled"


class PeerGoneError(Error, ConnectionError):
    """The peer disconnected, rejected the connection, or does not answer."""

    kind = "PeerGone"


class DeviceGoneError(Error):
    """The device failed, was removed, or was reset."""

    kind = "DeviceGone"


class TransportError(Error, ConnectionError):
    """A transfer failed on the wire or at the peer, or the connection failed before; the message says how."""

    kind = "Transport"


class SystemCallError(Error):
    """Any other error of the system: see ``errno``."""

    kind = "System"


_BY_KIND = {cls.kind: cls for cls in Error.__subclasses__()}


def of_kind(kind):
    """The class of a kind. A kind of a later library is an ``Error``."""
    return _BY_KIND.get(kind, Error)
