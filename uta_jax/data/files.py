"""Files of a dataset, local or behind a URL: what stat says, and bytes out of their middle.

Local paths go through the operating system, URLs (gs://, memory:// ...) through fsspec and whatever
backend of it is installed. Nothing is held open between reads, so that threads, forked and spawned
processes share no state, and any number of shards fits any limit on open files.
"""

import contextlib
import errno
import glob
import hashlib
import json
import operator
import os
import stat as stat_module
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from uta_jax import UserError
from uta_jax.data import BadExample, printable

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
MAX_BYTES = 2**27  # of one image: 128 MiB; a larger one would be read whole into memory
# What stays so when the file is read again. All other trouble may pass (a network disk that hangs,
# too many open files), and an example skipped for it would make other batches than without it.
_LASTING = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP}


def digest(*parts) -> str:
    """32 hexadecimal digits of JSON-able parts."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def checked_index(index, length: int) -> int:
    """The index as a Python int.

    Raises:
      IndexError: outside 0 .. length - 1.
    """
    index = operator.index(index)
    if not 0 <= index < length:
        raise IndexError(f"example {index} of {length}")
    return index


def is_remote(path: str) -> bool:
    """Whether the path is a URL."""
    return "://" in path


def filesystem(path: str) -> tuple:
    """fsspec's (file system, path in it) of a URL.

    Raises:
      UserError: a scheme that is unknown or whose package is not installed.
    """
    import fsspec

    try:
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise UserError(f"{path}: cannot be opened ({error})") from None


def local_if_file_url(path: str | os.PathLike) -> str:
    """file:///x as the local path /x; everything else unchanged."""
    return os.fspath(path).removeprefix("file://")


def is_dir(path: str) -> bool:
    """Whether path is a directory."""
    if not is_remote(path):
        return os.path.isdir(path)
    fs, name = filesystem(path)
    return fs.isdir(name)


def listed(path: str) -> list[str]:
    """Names of what is in a directory."""
    if not is_remote(path):
        return os.listdir(path)
    fs, name = filesystem(path)
    return [entry.rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(name, detail=False)]


def exists(path: str) -> bool:
    """Whether there is anything at path."""
    if not is_remote(path):
        return os.path.exists(path)
    fs, name = filesystem(path)
    return fs.exists(name)


def globbed(pattern: str) -> list[str]:
    """Paths of what matches a pattern, in no particular order."""
    if not is_remote(pattern):
        return glob.glob(pattern, recursive=True)
    fs, name = filesystem(pattern)
    return [fs.unstrip_protocol(found) for found in fs.glob(name)]


def stat(path: str) -> tuple[int, str]:
    """(size in bytes, version) of a file; the version changes when the file is written again.

    Raises:
      OSError: no such file, or no permission.
    """
    if not is_remote(path):
        return _version(os.stat(path))
    fs, name = filesystem(path)
    info = fs.info(name)
    marks = ("etag", "ETag", "generation", "mtime", "updated", "LastModified", "created")
    return info["size"], next((str(info[m]) for m in marks if info.get(m)), "")


def _version(about: os.stat_result) -> tuple[int, str]:
    return about.st_size, str(about.st_mtime_ns)


def open_file(path: str):
    """A file object to read bytes from."""
    if not is_remote(path):
        return open(path, "rb")
    fs, name = filesystem(path)
    return fs.open(name, "rb")


def read_ranges(
    path: str, ranges: Sequence[tuple[int, int]], expected: tuple[int, str] | None = None
) -> list[bytes]:
    """The bytes at each (offset, count) of a file; expected is what stat gave earlier.

    Raises:
      BadExample: a range too large.
      UserError: cannot be read, shorter than the ranges, or not the expected file.
    """
    if (largest := max(count for _, count in ranges)) > MAX_BYTES:
        raise BadExample(f"{path}: {largest} bytes in one piece, at most {MAX_BYTES} are read")
    if is_remote(path):
        parts = _read_remote(path, ranges)
    else:
        parts = _read_local(path, ranges, expected)
    for part, (offset, count) in zip(parts, ranges, strict=True):
        if len(part) != count:
            raise UserError(f"{path}: ends before byte {offset + count}")
    return parts


def _read_local(path: str | bytes, ranges, expected=None) -> list[bytes]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if expected and _version(os.fstat(descriptor)) != expected:
                raise UserError(
                    f"{path}: was changed while it was in use, so the examples are others; start "
                    "again to take up the change"
                )
            return [os.pread(descriptor, count, offset) for offset, count in ranges]
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UserError(unreadable(path, error)) from None


def _read_remote(path: str, ranges) -> list[bytes]:
    fs, name = filesystem(path)
    wanted = [(offset, offset + count) for offset, count in ranges if count]  # HTTP has no empty
    try:
        starts, ends = [start for start, _ in wanted], [end for _, end in wanted]
        parts = iter(fs.cat_ranges([name] * len(wanted), starts, ends, on_error="raise"))
        return [next(parts) if count else b"" for _, count in ranges]
    except Exception as error:  # of whatever kind the backend raises, after its own retries
        # Never skipped: what a bad network keeps back would be another batch than without it.
        reason = printable(f"{type(error).__name__}: {error}")
        raise UserError(f"{path}: cannot be read ({reason})") from None


def read_whole(path: str | bytes) -> bytes:
    """All bytes of a local file, at most MAX_BYTES.

    Raises:
      BadExample: gone, no permission, not a regular file, too large.
      UserError: trouble that may pass.
    """
    try:
        # Without waiting: opening a pipe would otherwise wait for somebody to write.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            about = os.fstat(descriptor)
            if not stat_module.S_ISREG(about.st_mode):
                raise BadExample(f"{shown(path)}: not a regular file")
            if about.st_size > MAX_BYTES:
                raise BadExample(f"{shown(path)}: {about.st_size} bytes, at most {MAX_BYTES}")
            return os.pread(descriptor, about.st_size, 0)
        finally:
            os.close(descriptor)
    except OSError as error:
        kind = BadExample if error.errno in _LASTING else UserError
        raise kind(unreadable(path, error)) from None


def unreadable(path: str | bytes, error: Exception) -> str:
    """What to say of a file that cannot be read."""
    reason = getattr(error, "strerror", "") or str(error) or type(error).__name__
    # Libraries of other languages give the words alone.
    few = any(os.strerror(number) in reason for number in (errno.EMFILE, errno.ENFILE))
    hint = "; raise the limit (ulimit -n)" if few else ""
    return f"{shown(path)}: cannot be read ({printable(reason)}){hint}"


@contextlib.contextmanager
def output(path: str | os.PathLike) -> Iterator[TextIO]:
    """A text file to write: it appears whole, when the context ends, or not at all.

    Raises:
      UserError: it cannot be written there; as early as can be known.
    """
    target = os.path.realpath(path)
    special = os.path.exists(target) and not os.path.isfile(target)  # a pipe, a terminal
    place = target if special else f"{target}.{uuid.uuid4().hex}.tmp"
    try:
        with open(place, "w", encoding="utf-8") as file:
            yield file
        if not special:
            os.replace(place, target)
    except OSError as error:
        raise UserError(f"{shown(os.fspath(path))}: {error.strerror or error}") from None
    finally:
        if not special and os.path.exists(place):
            os.unlink(place)


def spread(count: int, length: int) -> list[int]:
    """At most `count` numbers, evenly over 0 .. length - 1."""
    return sorted({n * length // count for n in range(count)})


def sample_images(source) -> list[str]:
    """Hashes of 16 images of a source, for its fingerprint: a file can change and keep its size."""

    def of(index: int) -> str:
        try:
            return hashlib.sha256(source[index]["image"]).hexdigest()
        except BadExample:  # which is no reason not to open the others
            return "unreadable"

    return [of(index) for index in spread(16, len(source))]


def cpu_count() -> int:
    """How many processors this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def shown(path: str | bytes) -> str:
    """A path as one line of text."""
    return printable(os.fsdecode(path))


def cache_dir() -> Path:
    """Where things are kept that cannot be kept beside the data: $UTA_JAX_CACHE, or ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("UTA_JAX_CACHE") or Path(home) / "uta-jax")


class OpenFiles:
    """The files last used, kept open: for readers that take long to open.

    Every process has its own; threads share them. A file is closed by the last thread that lets go
    of it, never under another one's hands.
    """

    def __init__(self, open_one: Callable, limit: int):
        self._open_one, self._limit = open_one, limit
        self._start()

    def _start(self, inherited=()):
        self._files: OrderedDict = OrderedDict()
        self._lock, self._pid = threading.Lock(), os.getpid()
        self._inherited = inherited  # of the parent process: neither used nor closed here

    def __getstate__(self):
        return {"_open_one": self._open_one, "_limit": self._limit}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._start()

    def __call__(self, key):
        """The open file of a key."""
        if self._pid != os.getpid():
            self._start(self._files)  # before the lock, which a thread left behind may hold
        with self._lock:
            if key in self._files:
                self._files.move_to_end(key)
                return self._files[key]
        opened = self._open_one(key)  # outside the lock: it may take long
        with self._lock:
            opened = self._files.setdefault(key, opened)
            while len(self._files) > self._limit:
                self._files.popitem(last=False)
        return opened
