"""XLA's compilations kept on disk, so that a second start does not compile again."""

import hashlib
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

_COUNTS = {
    "/jax/compilation_cache/cache_hits": "hit",
    "/jax/compilation_cache/cache_misses": "miss",
}
_WORTH_S = 0.5  # seconds of compilation from which on the result is kept


def use(directory: str) -> None:
    """Keep compilations in ``directory`` (~ is the home; "" keeps none), unless JAX was told where.

    JAX_COMPILATION_CACHE_DIR goes first. Code for CPUs is kept by kind of CPU: it may hold
    instructions that another one lacks.
    """
    if not directory or jax.config.jax_compilation_cache_dir:
        return
    path = Path(directory).expanduser()
    if jax.default_backend() == "cpu":
        path /= f"cpu-{_cpu()}"
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _WORTH_S)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        flags = platform.processor()
    return hashlib.sha256(flags.encode()).hexdigest()[:8]


@contextmanager
def watched() -> Iterator[dict[str, int]]:
    """Counts how many compilations in this context were found (hit), or not (miss)."""
    counts = {"hit": 0, "miss": 0}

    def note(event: str, **_) -> None:
        if event in _COUNTS:
            counts[_COUNTS[event]] += 1

    jax.monitoring.register_event_listener(note)
    try:
        yield counts
    finally:
        jax.monitoring.unregister_event_listener(note)


def verdict(counts: dict[str, int]) -> str:
    """What to print of a compilation."""
    where = jax.config.jax_compilation_cache_dir
    if not where:
        return "compilations are not kept"
    return f"{'found in' if counts['hit'] else 'now kept in'} {where}"
