"""One run a workdir: a lock that names its holder and dies with it."""

import fcntl
import json
import os
import socket
import time
from pathlib import Path

from uta_jax import UserError

_PATIENCE = 5.0  # seconds; a run that was just killed may still be going


class Lock:
    """Held from creation to ``close``, or to the death of the process, however it dies.

    The kernel keeps it (flock), so nothing has to be cleaned up. It holds between machines on NFS
    if the mount has locks (not with ``nolock``) and on file systems such as Lustre if mounted with
    ``flock``; on one machine it holds always.
    """

    def __init__(self, workdir: Path):
        """Raises UserError naming the holder if another has it, or where nothing can be written."""
        try:
            self._file = (workdir / "lock").open("a+", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"--workdir={workdir} cannot be written to: {error.strerror}; change that, "
                "or name another workdir"
            ) from error
        deadline = time.monotonic() + _PATIENCE
        while not self._try():
            if time.monotonic() > deadline:
                holder = self._holder()
                self._file.close()
                raise UserError(
                    f"--workdir={workdir} is in use by {holder}: stop that run, or name another "
                    "workdir"
                )
            time.sleep(0.1)
        self._file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        about = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
        self._file.write(json.dumps(about) + "\n")
        self._file.flush()

    def _try(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _holder(self) -> str:
        self._file.seek(0)
        try:
            about = json.loads(self._file.read())
            return f"process {about['pid']} on {about['host']} since {about['since']}"
        except (ValueError, KeyError, TypeError):
            return "another process"

    def close(self) -> None:
        """Let the next one in."""
        self._file.close()
