"""The same batches from every kind of source, whoever computes them.

The images are JPEGs large enough to be decoded at a fraction of their size, some of them grey or
CMYK, which take other ways to pixels; emoji scenes are PNGs.
"""

import functools
import hashlib
import io
import itertools
import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from uta_jax.data.loader import Reading, TrainLoader
from uta_jax.data.sources import SOURCES, open_mixture, open_source
from uta_jax.data.tokenizer import Tokenizer

EXAMPLES, BATCH, BATCHES = 60, 8, 51


@functools.cache
def image(n):
    """A JPEG of 64 pixels a side: every seventh grey, every eleventh CMYK."""
    rng, mode = np.random.default_rng(n), "L" if n % 7 == 0 else "CMYK" if n % 11 == 0 else "RGB"
    cells = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    cells.resize((64, 64)).convert(mode).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def folder(root):
    for n in range(EXAMPLES):
        (root / str(n % 3)).mkdir(exist_ok=True)
        (root / str(n % 3) / f"{n:02}.jpg").write_bytes(image(n))
    return root, ""


def tar(root):
    for shard in range(3):
        with tarfile.open(root / f"train-{shard}.tar", "w") as file:
            for n in range(shard, EXAMPLES, 3):
                members = {"jpg": image(n), "txt": f"picture {n}".encode()}
                for suffix, data in members.items():
                    member = tarfile.TarInfo(f"{n:02}.{suffix}")
                    member.size = len(data)
                    file.addfile(member, io.BytesIO(data))
    return root, "train"


def arrayrecord(root):
    from array_record.python import array_record_module

    for shard in range(2):
        path = str(root / f"train-{shard:05}-of-00002.array_record")
        writer = array_record_module.ArrayRecordWriter(path, "group_size:1")
        for n in range(shard, EXAMPLES, 2):
            writer.write(image(n))
        writer.close()
    return root, "train"


def parquet(root):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"image": {"bytes": image(n), "path": f"{n}.jpg"}, "text": f"picture {n}"}
        for n in range(EXAMPLES)
    ]
    pq.write_table(pa.Table.from_pylist(rows), root / "train.parquet", row_group_size=16)
    return root, "train"


# (workers, processes): starting a worker takes longer than all that these tests have it do. Set
# EVERY_COMBINATION in the environment to see all twelve for every kind (minutes).
SOME = ((0, 4), (1, 2), (3, 1))
MAKE = {"folder": folder, "tar": tar, "arrayrecord": arrayrecord, "parquet": parquet}


@pytest.fixture(scope="module")
def source_of(tmp_path_factory, scenes):
    """The function that opens a source of a kind."""

    def opened(kind):
        if kind == "tfds":
            return open_source(kind, scenes, f"train[:{EXAMPLES}]")
        if kind == "synthetic":
            return open_source(kind, f"64x48:{EXAMPLES}", "")
        if kind == "mixture":
            root, _ = folder(tmp_path_factory.mktemp("part"))
            parts = [("folder", str(root), "", 2.0), ("synthetic", "64x48:30", "", 1.0)]
            return open_mixture(parts)
        return open_source(kind, *MAKE[kind](tmp_path_factory.mktemp(kind)))

    return opened


def take(source, batches, seen=0, workers=0, **options):
    defaults = {"batch_size": BATCH, "seed": 3, "image_size": 8, "crop_scale": (0.4, 1)}
    tokenizer = Tokenizer(8) if "text" in source.fields else None
    stream = TrainLoader(
        source, tokenizer=tokenizer, reading=Reading(workers, timeout_s=60), **defaults | options
    )
    stream.resume(stream.state() | {"examples_seen": seen})
    try:
        return [next(stream) for _ in range(batches)]
    finally:
        assert stream.bad_examples == 0
        stream.close()


def digests(batches):
    """sha256 of everything in each batch: ids, pixels, and labels and texts where there are."""
    return [
        hashlib.sha256(b"".join(batch[name].tobytes() for name in sorted(batch))).hexdigest()
        for batch in batches
    ]


def joined(parts):
    """The batches of several processes, in process order."""
    return [
        {name: np.concatenate([part[name] for part in step]) for name in step[0]}
        for step in zip(*parts, strict=True)
    ]


@pytest.mark.parametrize("kind", [*SOURCES, "mixture"])
def test_batches_are_the_same_whoever_computes_them(kind, source_of):
    """Over workers and processes as in SOME, all twelve for synthetic; and after four restarts, two
    of them with a worker process."""
    every = kind == "synthetic" or "EVERY_COMBINATION" in os.environ
    source = source_of(kind)
    whole = take(source, BATCHES)
    reference = digests(whole)
    assert len(set(reference)) == BATCHES
    for workers, processes in itertools.product(range(4), (1, 2, 4)) if every else SOME:
        parts = [
            take(source, BATCHES, workers=workers, process_index=p, process_count=processes)
            for p in range(processes)
        ]
        assert digests(joined(parts)) == reference, (workers, processes)
    for workers, step in enumerate((1, 7, 8, 33)):  # the epochs end within batches 7, 15, 22 ...
        again = take(source, BATCHES - step, seen=step * BATCH, workers=workers % 2)
        assert digests(again) == reference[step:], step
    assert not set(digests(take(source, BATCHES, seed=4))) & set(reference)
    ids = np.concatenate([batch["index"] for batch in whole])
    epochs = ids[: len(ids) // len(source) * len(source)].reshape(-1, len(source)).tolist()
    assert all(sorted(epoch) == [*range(len(source))] for epoch in epochs) and len(epochs) >= 3
    assert len(set(map(tuple, epochs))) == len(epochs)
    assert json.loads(json.dumps(source.describe())) == source.describe()
