"""Which files make up a dataset: directories, globs and braces, local or behind a URL."""

import glob
import hashlib
import itertools
import os
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass

from uta_jax import UserError
from uta_jax.data import printable
from uta_jax.data.files import (
    exists,
    globbed,
    is_dir,
    listed,
    local_if_file_url,
    read_ranges,
    spread,
    stat,
)

MAX_SHARDS = 1_000_000  # that a pattern may stand for
_SAMPLES, _SAMPLE_BYTES = 32, 2**14


@dataclass(frozen=True)
class Shard:
    """A file of a dataset: name relative to the dataset, full path, and what stat says of it."""

    name: str
    path: str
    size: int  # bytes
    version: str


@dataclass(frozen=True)
class Shards:
    """The files of a dataset in order, the directory they share and the pattern that found them."""

    root: str
    pattern: str
    files: tuple[Shard, ...]


def find_shards(path: str | os.PathLike, split: str, suffixes: tuple[str, ...]) -> Shards:
    """The files that `path` names: a directory, a file, a glob, or braces {00000..00007} {a,b}.

    In a directory, `split` is a sub-directory or what the names start with ("train-00000.tar");
    elsewhere it must be empty. Files of a directory or glob come sorted, those of braces in order.

    Raises:
      UserError: nothing there, or shards missing: from the range in braces, or, where a directory
        or glob finds names like x-00001-of-00008, from their number.
    """
    path = local_if_file_url(path).rstrip("/") or "/"
    where = f"data.path={path}"
    directory = is_dir(path)
    if split and not directory:
        raise UserError(f"{where}, data.split={split!r}: set data.split='', path names the files")
    pattern = split
    if directory:
        found = _in_directory(path, split, suffixes)
    else:
        found, pattern = _matching(path, suffixes), _after_directories(path)
    if not found:
        where += f", data.split={split!r}" if split else ""
        raise UserError(f"{where}: no {' or '.join(suffixes)} files there")
    root = _common_directory(found)
    names = [name[len(root) :].lstrip("/") for name in found]
    if directory or (glob.has_magic(path) and "{" not in path):  # others may want a part of a set
        _check_numbering(where, names)
    return Shards(root, pattern, _all_stat(where, names, found))


def _in_directory(path: str, split: str, suffixes: tuple[str, ...]) -> list[str]:
    inside = f"{path.rstrip('/')}/{split}"
    if split and is_dir(inside):
        return _in_directory(inside, "", suffixes)
    names = listed(path)
    if split:
        names = [n for n in names if re.match(re.escape(split) + r"[^0-9A-Za-z]", n)]
    return [f"{path.rstrip('/')}/{n}" for n in sorted(names) if _has_suffix(n, suffixes)]


def _has_suffix(name: str, suffixes: tuple[str, ...]) -> bool:
    """Also x.tar-00000-of-00008, as TFDS names its files."""
    return re.sub(r"-\d+-of-\d+$", "", name).endswith(suffixes)


def _matching(path: str, suffixes: tuple[str, ...]) -> list[str]:
    """Files of a pattern that is no directory; those of braces need not exist."""
    if exists(path):  # also where its name has braces or brackets
        return [path]
    found = []
    for name in expand_braces(path):
        if glob.has_magic(name):
            found += sorted(n for n in globbed(name) if _has_suffix(n, suffixes))
        else:
            found.append(name)
    return found


_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")


def expand_braces(pattern: str) -> list[str]:
    """As the shell does: {08..11} (zeros kept) and {a,b}, several multiply.

    Raises:
      UserError: a range that runs backwards, or more than MAX_SHARDS names.
    """
    pieces, end, count = [], 0, 1
    for found in _BRACES.finditer(pattern):
        choices = _choices(pattern, *found.groups())
        count *= len(choices)
        if not 0 < count <= MAX_SHARDS:
            raise UserError(f"data.path={pattern}: braces stand for 1 to {MAX_SHARDS} names")
        pieces += [[pattern[end : found.start()]], choices]
        end = found.end()
    return ["".join(parts) for parts in itertools.product(*pieces, [pattern[end:]])]


def _choices(pattern: str, first: str | None, last: str | None, names: str | None) -> Sequence[str]:
    if names is not None:
        return names.split(",")
    numbers = range(int(first), int(last) + 1)
    if not 0 < len(numbers) <= MAX_SHARDS:
        raise UserError(
            f"data.path={pattern}: {{{first}..{last}}} must run upwards over at most {MAX_SHARDS}"
        )
    return [str(n).zfill(len(first)) for n in numbers]


def _after_directories(pattern: str) -> str:
    """The part of a pattern behind its last directory without special characters."""
    special = re.search(r"[{*?\[]", pattern)
    return pattern[pattern.rfind("/", 0, special.start() if special else None) + 1 :]


def _common_directory(paths: list[str]) -> str:
    scheme, _, rest = paths[0].rpartition("://")
    skip = len(scheme) + 3 if scheme else 0
    folders = {posixpath.dirname(p[skip:]) for p in paths}
    common = posixpath.commonpath(folders) if len(folders) > 1 else folders.pop()
    return paths[0][:skip] + common


def _all_stat(where: str, names: list[str], paths: list[str]) -> tuple[Shard, ...]:
    shards, missing = [], []
    for name, path in zip(names, paths, strict=True):
        try:
            shards.append(Shard(name, path, *stat(path)))
        except FileNotFoundError:
            missing.append(name)
        except OSError as error:
            raise UserError(f"{where}: {name} cannot be read ({error.strerror})") from None
    if missing:
        raise UserError(f"{where}: {len(missing)} of {len(names)} shards missing: {some(missing)}")
    if len(set(names)) < len(names):
        twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
        raise UserError(f"{where}: shards named twice: {some(twice)}")
    return tuple(shards)


_NUMBERED = re.compile(r"(.*?)(\d+)-of-(\d+)(.*)")


def _check_numbering(where: str, names: list[str]) -> None:
    """Refuse sets like x-00000-of-00008 that are not whole."""
    sets: dict[tuple, set[int]] = {}
    for name in names:
        if found := _NUMBERED.fullmatch(name):
            head, number, total, tail = found.groups()
            sets.setdefault((head, total, tail), set()).add(int(number))
    for (head, total, tail), numbers in sets.items():
        width = len(total)
        if len(numbers) < int(total) <= MAX_SHARDS:
            gone = [n for n in range(int(total)) if n not in numbers]
            gone_names = [f"{head}{n:0{width}}-of-{total}{tail}" for n in gone]
            raise UserError(
                f"{where}: {len(gone)} of {int(total)} shards missing: {some(gone_names)} (a part "
                "of the set is asked for with braces, {00000..00003})"
            )


def some(names: Sequence[str], count: int = 5) -> str:
    """The first few names in one line."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(map(printable, names[:count])) + more


def sample_bytes(shards: Sequence[Shard]) -> str:
    """A hash of 32 pieces of 16 KiB, spread evenly over the bytes of all shards.

    Raises:
      UserError: a shard cannot be read.
    """
    ends = list(itertools.accumulate(shard.size for shard in shards))
    hashed = hashlib.sha256()
    spots = iter(spread(_SAMPLES, ends[-1]))
    spot = next(spots, None)
    for shard, end in zip(shards, ends, strict=True):
        ranges = []
        while spot is not None and spot < end:
            offset = spot - (end - shard.size)
            ranges.append((offset, min(_SAMPLE_BYTES, shard.size - offset)))
            spot = next(spots, None)
        for part in read_ranges(shard.path, ranges) if ranges else ():
            hashed.update(part)
    return hashed.hexdigest()[:32]
