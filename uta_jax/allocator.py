"""What the C allocator does with freed memory. Speaks to glibc; elsewhere it changes nothing.

glibc hands large blocks back to the kernel, to be paged in and cleared again for the next step or
image, which costs small models more than their arithmetic and decoding a quarter of its time. It
must be told before threads start, for they take arenas of their own, which go by other options.
"""

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8  # malloc.h


def keep_all() -> None:
    """Freed memory stays in this process, in one arena for all threads."""
    _set({_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _ARENA_MAX: 1})


def keep_blocks() -> None:
    """Freed blocks of up to 32 MB stay; a giant image's do not."""
    _set({_MMAP_THRESHOLD: 2**25, _TRIM_THRESHOLD: 2**27})


def as_ever() -> None:
    """What glibc does by itself, after ``keep_all``."""
    _set({_MMAP_MAX: 65536, _TRIM_THRESHOLD: 128 * 1024, _ARENA_MAX: 0})


def _set(options: dict[int, int]) -> None:
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for option, value in options.items():
            libc.mallopt(option, value)
