"""What works on this machine, by the program ``dmabuf-rdma``."""

import errno
import json
import shutil
import subprocess
from os import PathLike
from typing import Any

from ._errors import NotFoundError, SystemCallError, TimeoutError


def doctor(program: str | PathLike[str] | None = None, timeout: float = 60.0) -> dict[str, Any]:
    """Says what works on this machine, for this user and in this container; if something does not, why and what to do.

    Runs ``dmabuf-rdma doctor --json`` and returns its answer as a dict, which docs/doctor.md describes: ``"grade"`` is
    "A" (every device moves every dma-buf) to "F" (no RDMA device opens), ``"summary"`` a sentence, and each of
    ``"findings"`` has a ``"cause"`` and a ``"remedy"``. It registers small buffers, transfers inside each device, changes
    no setting, and takes seconds.

    ``program`` is the path of the program; by default it is looked for in PATH. ``timeout`` is in seconds.

    Raises ``NotFoundError`` if the program is missing, ``TimeoutError``, and ``SystemCallError`` if it gives no answer.
    """
    found = shutil.which("dmabuf-rdma" if program is None else program)
    if found is None:
        raise NotFoundError(
            f"the program {program or 'dmabuf-rdma'} is not {'there' if program else 'in PATH'}",
            errno.ENOENT,
            "build it with `cargo install --path cli` in the project's folder, or pass its path",
        )
    try:
        done = subprocess.run([found, "doctor", "--json"], capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        raise TimeoutError(
            f"{found} doctor has not ended within {timeout} s",
            None,
            "pass a longer timeout, or run it in a shell to see where it waits",
        ) from None
    try:
        # The exit status is the grade's: 0 or 1.
        return json.loads(done.stdout)
    except ValueError:
        raise SystemCallError(
            f"{found} doctor ended with status {done.returncode} and no answer: {done.stderr.strip()[-500:]}",
            None,
            "run it in a shell; it must be of the same release as this package",
        ) from None
