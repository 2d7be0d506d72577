"""Figures of the sources: python tests/benchmarks/index.py [--files 100000] [--examples 10000000]

1. Tar shards of small files: seconds to index them and to open the index; microseconds a read.
2. Resident memory of a process that reads at random from an index of many examples, and the same
   for the table of names of a folder. The index and the table are real, the files are not there.
"""

import argparse
import io
import os
import random
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np

SHARD = 10_000  # examples


def write_shards(root: Path, files: int, shards: int = 8) -> None:
    """`files` small files: half of them images, half captions."""
    for shard in range(shards):
        with tarfile.open(root / f"{shard:05d}.tar", "w") as tar:
            for n in range(shard, files // 2, shards):
                for suffix, size in (("jpg", 2000), ("txt", 60)):
                    info = tarfile.TarInfo(f"{n:09d}.{suffix}")
                    info.size = size
                    tar.addfile(info, io.BytesIO(bytes(size)))


def index_and_open(files: int) -> None:
    from uta_jax.data.tarbuild import build_index
    from uta_jax.data.tars import TarSource

    with tempfile.TemporaryDirectory() as root:
        write_shards(Path(root), files)
        built = build_index(root, progress=False)
        start = time.perf_counter()
        source = TarSource(root)
        opened = time.perf_counter() - start
        order = random.Random(0).choices(range(len(source)), k=20_000)
        start = time.perf_counter()
        for index in order:
            source[index]
        each = (time.perf_counter() - start) / len(order)
    print(
        f"tar: {files} files in {built['shards']} shards indexed in {built['seconds']:.2f} s on "
        f"{os.cpu_count()} cores, opened in {opened:.3f} s, {each * 1e6:.0f} us a read of image "
        f"and caption, index of {built['bytes'] / built['examples']:.0f} bytes an example"
    )


def resident() -> tuple[int, int]:
    """(now, highest) resident memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() >> 20, resource.getrusage(
        resource.RUSAGE_SELF
    ).ru_maxrss >> 10


def big_index(path: str, examples: int) -> None:
    """An index as of shards of 10,000 images with captions and keys of 24 letters."""
    from uta_jax.data.tarindex import _RECORD, ShardIndex, write

    def parts():
        for first in range(0, examples, SHARD):
            count = min(SHARD, examples - first)
            records, keys = bytearray(count * _RECORD.size), bytearray()
            for row in range(count):
                at = (4 * row + 1, 2000, 4 * row + 3, 60, -1, len(keys), 24, 1)
                _RECORD.pack_into(records, row * _RECORD.size, *at)
                keys += b"%024d" % (first + row)
            name = f"{first // SHARD:05d}.tar"
            size = dict(examples=count, keys=len(keys), texts=count, digest="0" * 32)
            yield ShardIndex(name, 1, "1", **size), bytes(records + keys)

    write(path, parts())


def read_index(path: str) -> None:
    """In a process of its own: open it, look every example up once, at random."""
    from uta_jax.data.tarindex import TarIndex

    before = resident()[0]
    start = time.perf_counter()
    index = TarIndex(path)
    opened = time.perf_counter() - start
    order = np.random.default_rng(0).permutation(len(index)).astype(np.int32)
    start = time.perf_counter()
    for example in order[:500_000].tolist():
        index.find(example)
    each = (time.perf_counter() - start) / 500_000
    now, highest = resident()
    print(
        f"tar index: {len(index)} examples, {os.path.getsize(path) >> 20} MB, opened in "
        f"{opened:.2f} s, {each * 1e6:.1f} us a look-up; resident {now} MB (highest {highest}, "
        f"before opening {before}; {order.nbytes >> 20} of them for the order of this benchmark)"
    )


def read_folder(examples: int) -> None:
    """In a process of its own: the table of names of a folder like ImageNet's, 20 letters each."""
    from uta_jax.data import folder

    def walk(root):
        for n in range(examples):
            yield folder._File(
                b"n%08d/" % (n // 1300), b"n%08d_%06d.JPEG" % (n // 1300, n % 1300), 1
            )

    folder._walk = walk
    folder.read_whole = lambda path: path
    before = resident()[0]
    source = folder.ImageFolder(tempfile.gettempdir())
    order = random.Random(0).choices(range(len(source)), k=200_000)
    start = time.perf_counter()
    for index in order:
        source[index]
    each = (time.perf_counter() - start) / len(order)
    now, highest = resident()
    print(
        f"folder: {len(source)} examples in {len(source.class_names)} classes, {each * 1e6:.1f} us "
        f"a look-up; resident {now} MB (highest {highest}, before listing {before})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--examples", type=int, default=10_000_000)
    parser.add_argument("--read_index", help="only that, of this file")
    parser.add_argument("--read_folder", action="store_true", help="only that")
    args = parser.parse_args()
    if args.read_index:
        return read_index(args.read_index)
    if args.read_folder:
        return read_folder(args.examples)
    index_and_open(args.files)
    again = [sys.executable, __file__, f"--examples={args.examples}"]
    with tempfile.TemporaryDirectory() as root:
        path = os.path.join(root, "big.tarindex")
        big_index(path, args.examples)
        subprocess.run([*again, f"--read_index={path}"], check=True)
    subprocess.run([*again, "--read_folder"], check=True)


if __name__ == "__main__":
    main()
