"""The index of tar shards in webdataset layout: where the members of each example lie.

An index is one file, little endian:

    b"UTATAR1\\n"
    for each shard, in order:
        its records, 28 bytes each: _RECORD
        its keys, one after another, UTF-8 with surrogate escapes
    footer, JSON: {"shards": [{name, size, version, examples, offset, keys, ...}]}: ShardIndex
    uint64 length of the footer, b"UTATAR1\\n"

It is read by offset, never as a whole: processes share it in the page cache of the system, and what
it takes of a process's own memory does not grow with the number of examples.

Nothing is ever extracted. Members are read where they lie, so their names lead nowhere; a shard
with a name like ../x or /x, or with a link or device in it, is refused all the same.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import re
import struct
import tarfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from uta_jax import UserError
from uta_jax.data import printable
from uta_jax.data.files import IMAGE_SUFFIXES, open_file
from uta_jax.data.shards import Shard

_MAGIC = b"UTATAR1\n"
_TAIL = struct.Struct("<Q8s")
# Image at block, its bytes; text at block, its bytes; label; key at, its bytes; kind of text.
_RECORD = struct.Struct("<IIIIiIHBx")
_BLOCK = tarfile.BLOCKSIZE  # members start at multiples of it, so a block number fits 32 bits
NO_TEXT, TXT, JSON = range(3)
NO_LABEL = -1

# In webdataset's order of preference, where a sample has several.
_IMAGES = tuple(suffix[1:] for suffix in IMAGE_SUFFIXES)
_TEXTS = {"txt": TXT, "json": JSON}
# The key is everything up to the first dot of the last part of the path.
_MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7z": "xz"}


@dataclass(frozen=True)
class Entry:
    """One example: where its image and its caption lie in the shard (bytes), label and key."""

    image: tuple[int, int]  # offset, count
    text: tuple[int, int]
    text_kind: int  # NO_TEXT, TXT or JSON
    label: int  # NO_LABEL if there is none
    key: str


@dataclass(frozen=True)
class ShardIndex:
    """What the footer says of a shard."""

    name: str
    size: int
    version: str
    examples: int = 0
    offset: int = 0  # of its records in the index file
    keys: int = 0  # bytes of keys behind the records
    digest: str = ""  # of the records, the keys and the members' times of writing
    texts: int = 0  # examples that have one
    labels: int = 0  # examples that have one
    classes: int = 0  # largest label + 1
    without_image: tuple[int, str] = (0, "")  # samples left out, and the first of them
    problem: str = ""  # why the shard cannot be used

    def fits(self, shard: Shard) -> bool:
        """Whether it describes the file as it is now."""
        return (self.name, self.size, self.version) == (shard.name, shard.size, shard.version)


class _Problem(Exception):
    """Why a shard cannot be used."""


class _Sample:
    """The members of one key."""

    __slots__ = ("image", "image_rank", "label", "text", "text_kind")

    def __init__(self):
        self.image, self.image_rank = (0, 0), len(_IMAGES)
        self.text, self.text_kind = (0, 0), NO_TEXT
        self.label = NO_LABEL


def scan(shard: Shard) -> tuple[ShardIndex, bytes]:
    """Index one shard: its entry (offset still 0), and its records and keys.

    Never raises for what is in the file: entry.problem says what is wrong with it.
    """
    about = (shard.name, shard.size, shard.version)
    try:
        with open_file(shard.path) as file:
            samples, times = _samples(file, shard.size)
        return _packed(about, samples, times)
    except _Problem as problem:
        found = str(problem)
    except OSError as error:
        found = f"cannot be read ({error.strerror or error})"
    except (tarfile.TarError, ValueError, OverflowError) as error:
        found = f"not a tar file, cut off or damaged ({error})"
    return ShardIndex(*about, problem=printable(found)), b""


def _samples(file, size: int) -> tuple[dict[str, _Sample], str]:
    """Samples by key in order of appearance; and a hash of when the members were written."""
    start = file.read(4)
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise _Problem(f"compressed ({name}), so it cannot be read at random; decompress it")
    if not size:
        raise _Problem("empty (0 bytes)")
    file.seek(0)
    samples, times = {}, hashlib.sha256()
    with tarfile.open(
        fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape"
    ) as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # tarfile would keep them all
            _check_member(member, size)
            times.update(f"{member.mtime};".encode())
            if member.isreg():
                _add(samples, member, file)
        _check_end(file, archive.offset, size)
    return samples, times.hexdigest()


def _check_member(member: tarfile.TarInfo, size: int) -> None:
    name = member.name
    if name.startswith("/"):
        raise _Problem(f"member {name!r} has an absolute path; refused")
    if ".." in name.split("/"):
        raise _Problem(f"member {name!r} points outside; refused")
    if member.issym() or member.islnk():
        raise _Problem(f"member {name!r} is a link (to {member.linkname!r}); refused")
    if not member.isdir() and (not member.isreg() or member.issparse() or member.size < 0):
        raise _Problem(f"member {name!r} is not a plain file (type {member.type!r}); refused")
    if member.offset_data + member.size > size:
        raise _Problem(
            f"cut off: member {name!r} ends at byte {member.offset_data + member.size}, "
            f"the file at {size}"
        )


def _add(samples: dict[str, _Sample], member: tarfile.TarInfo, file) -> None:
    found = _MEMBER.fullmatch(member.name.removeprefix("./"))
    if not found:  # .DS_Store, README: no part of a sample
        return
    key, kind = found[1], found[2].lower()
    place = (member.offset_data // _BLOCK, member.size)
    sample = samples.setdefault(key, _Sample())
    if kind in _IMAGES:
        _take_image(sample, _IMAGES.index(kind), place, member)
    elif kind in _TEXTS:
        _take_text(sample, _TEXTS[kind], place, member)
    elif kind == "cls":
        if sample.label != NO_LABEL:
            raise _Problem(f"duplicate member {member.name!r}")
        sample.label = _label(file, member)


def _take_image(sample: _Sample, rank: int, place, member) -> None:
    if rank == sample.image_rank:
        raise _Problem(f"duplicate member {member.name!r}")
    if rank < sample.image_rank:
        sample.image, sample.image_rank = place, rank


def _take_text(sample: _Sample, kind: int, place, member) -> None:
    if kind == sample.text_kind:
        raise _Problem(f"duplicate member {member.name!r}")
    if sample.text_kind != TXT:  # .txt is the caption; .json otherwise
        sample.text, sample.text_kind = place, kind


def _label(file, member: tarfile.TarInfo) -> int:
    file.seek(member.offset_data)  # archive.next() finds its place again by itself
    text = file.read(min(member.size, 32))
    if not re.fullmatch(rb"\s*\d{1,9}\s*", text):
        raise _Problem(f"member {member.name!r} holds {text[:20]!r}, not the number of a class")
    return int(text)


def _check_end(file, offset: int, size: int) -> None:
    """tarfile takes a missing end and damage in the middle for the end."""
    file.seek(offset)
    block = file.read(_BLOCK)
    if len(block) < _BLOCK:
        raise _Problem(f"cut off: no end of archive at byte {offset} of {size}")
    if block.strip(b"\0"):
        raise _Problem(f"damaged: no header of a member at byte {offset} of {size}")
    if file.read(2**16).strip(b"\0"):
        raise _Problem(
            f"holds data behind the end of the archive at byte {offset} of {size}: archives put "
            "together with cat? Use tar --concatenate"
        )


def _packed(about: tuple, samples: dict[str, _Sample], times: str) -> tuple[ShardIndex, bytes]:
    usable = {key: s for key, s in samples.items() if s.image_rank < len(_IMAGES)}
    records, keys = bytearray(), bytearray()
    try:
        for key, s in usable.items():
            name = key.encode("utf-8", "surrogateescape")
            at = (*s.image, *s.text, s.label, len(keys), len(name), s.text_kind)
            records += _RECORD.pack(*at)
            keys += name
    except struct.error:
        raise _Problem("too large for the index: over 2 TiB, or a name over 65535 bytes") from None
    lacking = next((key for key in samples if key not in usable), "")
    data = bytes(records + keys)
    labels = [s.label for s in usable.values() if s.label != NO_LABEL]
    return ShardIndex(
        *about,
        examples=len(usable),
        keys=len(keys),
        digest=hashlib.sha256(data + times.encode()).hexdigest()[:32],
        texts=sum(s.text_kind != NO_TEXT for s in usable.values()),
        labels=len(labels),
        classes=max(labels, default=-1) + 1,
        without_image=(len(samples) - len(usable), printable(lacking)),
    ), data


class TarIndex:
    """An index file, open. Can be pickled, and used by threads and forked processes."""

    def __init__(self, path: str | os.PathLike):
        """Open the file.

        Raises:
          UserError: not an index, or cut off.
          OSError: not there.
        """
        self.path = os.fspath(path)
        self._file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        footer = self._footer()
        self._digest = hashlib.sha256(footer).hexdigest()
        entries = [s | {"without_image": tuple(s["without_image"])} for s in _parsed(footer)]
        self.shards = tuple(ShardIndex(**entry) for entry in entries)
        self._ends = np.cumsum([shard.examples for shard in self.shards], dtype=np.int64)

    def _footer(self) -> bytes:
        size = os.fstat(self._file).st_size
        tail = os.pread(self._file, _TAIL.size, max(0, size - _TAIL.size))
        if len(tail) == _TAIL.size:
            length, magic = _TAIL.unpack(tail)
            start = size - _TAIL.size - length
            if magic == _MAGIC and start >= len(_MAGIC):
                return os.pread(self._file, length, start)
        raise UserError(f"{self.path}: not an index of tar shards, or cut off; delete it")

    def __del__(self):
        if hasattr(self, "_file"):
            os.close(self._file)

    def __reduce__(self):
        return _reopen, (self.path, self._digest)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def find(self, index: int) -> tuple[int, Entry]:
        """(number of the shard, entry) of example `index`, 0 <= index < len."""
        number = int(np.searchsorted(self._ends, index, "right"))
        shard = self.shards[number]
        row = index - int(self._ends[number]) + shard.examples
        record = os.pread(self._file, _RECORD.size, shard.offset + row * _RECORD.size)
        image, image_size, text, text_size, label, at, size, kind = _RECORD.unpack(record)
        key = os.pread(self._file, size, shard.offset + shard.examples * _RECORD.size + at)
        places = (image * _BLOCK, image_size), (text * _BLOCK, text_size)
        return number, Entry(*places, kind, label, _decoded(key))

    def data(self, shard: ShardIndex) -> bytes:
        """The records and keys of a shard, as scan gave them."""
        count = shard.examples * _RECORD.size + shard.keys
        return os.pread(self._file, count, shard.offset)

    def keys(self, shard: ShardIndex) -> Iterator[str]:
        """The keys of a shard, in order."""
        data = self.data(shard)
        keys = memoryview(data)[shard.examples * _RECORD.size :]
        for row in range(shard.examples):
            *_, at, size, _ = _RECORD.unpack_from(data, row * _RECORD.size)
            yield _decoded(bytes(keys[at : at + size]))


def _parsed(footer: bytes) -> list[dict]:
    return json.loads(footer)["shards"]


def _decoded(key: bytes) -> str:
    return printable(key.decode("utf-8", "surrogateescape"))


def _reopen(path: str, digest: str) -> TarIndex:
    """In another process: the same index, or none."""
    index = TarIndex(path)
    if index._digest != digest:
        raise UserError(f"{path}: was rebuilt while it was in use; start again")
    return index


def write(path: str, parts: Iterator[tuple[ShardIndex, bytes]]) -> None:
    """Write an index of (entry, records and keys) of the shards; whole or not at all.

    Raises:
      OSError: cannot be written there.
    """
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"  # other hosts may be writing, too
    try:
        with open(temporary, "wb") as file:
            file.write(_MAGIC)
            shards = []
            for entry, data in parts:
                shards.append(dataclasses.asdict(dataclasses.replace(entry, offset=file.tell())))
                file.write(data)
            footer = json.dumps({"shards": shards}).encode()
            file.write(footer + _TAIL.pack(len(footer), _MAGIC))
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def duplicates(index: TarIndex) -> Iterator[tuple[str, str, str]]:
    """(key, first shard, second shard) of keys that several shards have."""
    hashes = np.fromiter(
        (hash(key) for shard in index.shards for key in index.keys(shard)), np.int64, len(index)
    )
    hashes.sort()
    suspects = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    first: dict[str, str] = {}
    for shard, key in itertools.chain.from_iterable(
        zip(itertools.repeat(shard), index.keys(shard)) for shard in index.shards
    ):
        if suspects and hash(key) in suspects:
            if first.setdefault(key, shard.name) != shard.name:
                yield key, first[key], shard.name
