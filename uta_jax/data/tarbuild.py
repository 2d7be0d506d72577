"""Building the index of tar shards, in parallel, and keeping it beside them."""

import contextlib
import hashlib
import multiprocessing
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from uta_jax import UserError
from uta_jax.data.files import cache_dir, cpu_count, filesystem, is_remote
from uta_jax.data.shards import Shard, Shards, find_shards, some
from uta_jax.data.tarindex import ShardIndex, TarIndex, scan, write

_SERIAL_BYTES = 2**26  # fewer are indexed sooner than processes are started
_REMOTE_THREADS = 32


def current_index(shards: Shards, progress: bool | None) -> tuple[TarIndex, int]:
    """The index of the shards as they are now, and how many of them had to be read for it.

    Kept beside the shards, or in the cache directory where that cannot be written or is remote.

    Raises:
      UserError: it cannot be written in either place, or would hold nothing.
    """
    place = _remote_copy(shards) if is_remote(shards.root) else None
    places = [place] if place else _local_places(shards)
    old = None
    for index in filter(None, map(_opened, places)):
        same = [entry.name for entry in index.shards] == [shard.name for shard in shards.files]
        if same and all(_fits(index, shards)):
            return index, 0
        old = index if old is None else old
    place = next(filter(_writable, places), None)
    if place is None:
        raise UserError(
            f"{places[-1]}: the index of {shards.root} cannot be written there, nor beside the "
            "shards; set UTA_JAX_CACHE to a directory that can"
        )
    indexed = _build(place, shards, old, progress)
    if is_remote(shards.root):
        _upload(place, shards)
    return TarIndex(place), indexed


def build_index(path: str | os.PathLike, progress: bool = True, split: str = "") -> dict:
    """Build the index of tar shards, or bring it up to date.

    Returns: index (where it is), examples, shards, indexed (shards read now), bytes (of the index)
    and seconds.

    Raises:
      UserError: no shards, missing or damaged ones (all of them named), or no image.
    """
    start = time.perf_counter()
    shards = find_shards(path, split, (".tar",))
    index, indexed = current_index(shards, progress)
    refuse_problems(shards, index.shards)
    return {
        "index": index.path,
        "examples": len(index),
        "shards": len(shards.files),
        "indexed": indexed,
        "bytes": os.path.getsize(index.path),
        "seconds": time.perf_counter() - start,
    }


def refuse_problems(shards: Shards, entries: Sequence[ShardIndex]) -> None:
    """Refuse a set with shards that cannot be used, or without an image.

    Raises:
      UserError: naming them.
    """
    bad = [f"{entry.name}: {entry.problem}" for entry in entries if entry.problem]
    if bad:
        raise UserError(
            f"data.path={shards.root}: {len(bad)} of {len(entries)} shards cannot be used: "
            + some(bad)
        )
    if not any(entry.examples for entry in entries):
        raise UserError(f"data.path={shards.root}: {len(entries)} shards, but no image")


def _fits(index: TarIndex | None, shards: Shards) -> list[bool]:
    """For each shard, whether the index has it, sound and as it is now, in the same place."""
    known = {entry.name: entry for entry in index.shards} if index is not None else {}
    return [
        s.name in known and known[s.name].fits(s) and not known[s.name].problem
        for s in shards.files
    ]


def _build(place: str, shards: Shards, old: TarIndex | None, progress: bool | None) -> int:
    """Write the index, taking over what the old one knows; returns how many shards were read."""
    fits = _fits(old, shards)
    fresh = scanned([s for s, fit in zip(shards.files, fits, strict=True) if not fit], progress)
    known = {entry.name: entry for entry in old.shards} if old is not None else {}
    if old is not None:
        print(_changes(shards, known, fits), file=sys.stderr, flush=True)

    def parts() -> Iterator[tuple[ShardIndex, bytes]]:
        entries = []
        for shard, fit in zip(shards.files, fits, strict=True):
            part = (known[shard.name], old.data(known[shard.name])) if fit else next(fresh)
            entries.append(part[0])
            yield part
        yield from fresh  # nothing more: ends the bar
        if not any(entry.examples for entry in entries):  # leave no file beside what is no set
            refuse_problems(shards, entries)

    with contextlib.closing(fresh):
        write(place, parts())
    return fits.count(False)


def _changes(shards: Shards, known: dict[str, ShardIndex], fits: list[bool]) -> str:
    """Why an index is built again."""
    now = {shard.name for shard in shards.files}
    kinds: dict[str, list[str]] = {"changed": [], "new": [], "bad before": []}
    for shard, fit in zip(shards.files, fits, strict=True):
        if not fit:
            bad = shard.name in known and known[shard.name].fits(shard)
            kind = "bad before" if bad else "changed" if shard.name in known else "new"
            kinds[kind].append(shard.name)
    kinds["gone"] = [name for name in known if name not in now]
    said = [f"{len(names)} {kind} ({some(names)})" for kind, names in kinds.items() if names]
    return f"{shards.root}: shards since they were indexed: {', '.join(said) or 'other order'}"


def scanned(
    shards: Sequence[Shard], progress: bool | None = False
) -> Iterator[tuple[ShardIndex, bytes]]:
    """tarindex.scan of each shard, in order, by as many processes as there are processors.

    Remote shards are read by threads: there the network is what takes long.

    Raises:
      UserError: the processes died.
    """
    from tqdm import tqdm

    disable = None if progress is None else not progress
    with _scanning_map(shards) as run_map:
        yield from tqdm(run_map(scan, shards), "index", len(shards), unit="shard", disable=disable)


@contextlib.contextmanager
def _scanning_map(shards: Sequence[Shard]) -> Iterator[Callable]:
    """A map function that keeps the order of its results."""
    pool = _pool(shards)
    if pool is None:
        yield map
        return
    try:
        yield pool.map
    except BrokenProcessPool:
        hint = (
            'out of memory, or no `if __name__ == "__main__":` in the script; '
            "`uta-jax data index` builds the index beforehand"
        )
        raise UserError(f"the processes that index the shards died: {hint}") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _pool(shards: Sequence[Shard]) -> Executor | None:
    if shards and is_remote(shards[0].path):
        return ThreadPoolExecutor(min(_REMOTE_THREADS, len(shards)))
    processes = min(cpu_count(), len(shards))
    if processes <= 1 or sum(shard.size for shard in shards) < _SERIAL_BYTES:
        return None
    # Spawned, because fork is unsafe once JAX runs its threads.
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))


def _opened(place: str) -> TarIndex | None:
    try:
        return TarIndex(place)
    except FileNotFoundError:
        return None
    except (UserError, OSError, ValueError, KeyError, TypeError) as error:
        print(f"{place}: not usable, built again ({error})", file=sys.stderr, flush=True)
        return None


def _name(shards: Shards, *also: str) -> str:
    """One directory can hold indexes of several patterns."""
    about = "\n".join((shards.pattern, *also))
    return f"uta-jax-{hashlib.sha256(about.encode()).hexdigest()[:12]}.tarindex"


def _local_places(shards: Shards) -> list[str]:
    beside = os.path.join(shards.root, _name(shards))
    return [beside, _cached(shards)]


def _cached(shards: Shards) -> str:
    root = shards.root if is_remote(shards.root) else os.path.abspath(shards.root)
    return str(cache_dir() / _name(shards, root))


def _writable(place: str) -> bool:
    try:
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=Path(place).parent):
            return True
    except OSError:
        return False


def _remote_copy(shards: Shards) -> str:
    """Where the local copy of a remote index lies, fetched if there is one beside the shards."""
    place = _cached(shards)
    fs, root = filesystem(shards.root)
    beside = f"{root}/{_name(shards)}"
    if not os.path.exists(place) and fs.exists(beside):
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        temporary = f"{place}.{uuid.uuid4().hex}.tmp"
        fs.get_file(beside, temporary)
        os.replace(temporary, place)
    return place


def _upload(place: str, shards: Shards) -> None:
    """For other hosts. Without leave to write there, each builds its own."""
    fs, root = filesystem(shards.root)
    try:
        fs.put_file(place, f"{root}/{_name(shards)}")
    except Exception as error:  # of whatever kind the backend raises
        print(f"{shards.root}: index not stored there ({error})", file=sys.stderr, flush=True)
