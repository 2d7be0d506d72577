"""ArrayRecord files as sources: those that TFDS prepared, and plain ones."""

import bisect
import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from uta_jax import UserError
from uta_jax.data import BadExample, printable
from uta_jax.data.files import (
    OpenFiles,
    checked_index,
    digest,
    is_remote,
    local_if_file_url,
    sample_images,
    unreadable,
)
from uta_jax.data.shards import find_shards, sample_bytes, some

_OPEN_FILES = 64  # readers that a process keeps; each holds a file descriptor
_COUNTING_THREADS = 16
_SAMPLES = 16
SUFFIXES = (".array_record", ".arrayrecord")
# How image files begin, by which a record that is an image is told from one that is not.
_IMAGE_STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"RIFF", b"BM")


class _Part(NamedTuple):
    """Records skip .. skip + take - 1 of a file, which should have `total` (None: any number)."""

    path: str
    skip: int
    take: int
    total: int | None


def _reader(path: str):
    from array_record.python import array_record_module

    if not is_remote(path):
        os.close(os.open(path, os.O_RDONLY))  # the reader gives no reason why it cannot
    # No reading ahead: records are asked for at random, one at a time.
    reader = array_record_module.ArrayRecordReader(
        path, "readahead_buffer_size:0", file_reader_buffer_size=2**15
    )
    if not reader.ok():  # a damaged file has 0 records otherwise, without an error
        try:
            reader.read([0])
        except RuntimeError as error:
            raise RuntimeError(str(error).split(";")[0]) from None
        raise RuntimeError("too short")
    return reader


def _count(path: str) -> int | str:
    """How many records a file has, or what is wrong with it."""
    try:
        reader = _reader(path)
        try:
            return reader.num_records()
        finally:
            reader.close()
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    except RuntimeError as error:
        return printable(f"cut off or damaged ({error})")


def _counts(paths: Sequence[str]) -> list[int | str]:
    with ThreadPoolExecutor(_COUNTING_THREADS) as pool:
        return list(pool.map(_count, paths))


class _Records:
    """Records of several files by one index. Can be pickled; safe in threads and after a fork."""

    def __init__(self, parts: Sequence[_Part]):
        self.parts = parts
        self._ends = list(itertools.accumulate(part.take for part in parts))
        self._readers = OpenFiles(_reader, _OPEN_FILES)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def place(self, index: int) -> tuple[_Part, int]:
        number = bisect.bisect_right(self._ends, index)
        part = self.parts[number]
        return part, index - (self._ends[number] - part.take) + part.skip

    def __getitem__(self, index: int) -> bytes:
        part, position = self.place(index)
        try:
            reader = self._readers(part.path)
        except (OSError, RuntimeError) as error:
            raise UserError(unreadable(part.path, error)) from None
        try:
            record = reader.read([position])[0]
        except RuntimeError as error:
            # Of a system call ("pread() failed: ...") or the network: not the record's fault.
            if is_remote(part.path) or "() failed" in str(error):
                raise UserError(unreadable(part.path, error)) from None
            raise BadExample(f"{part.path}: record {position} cannot be read ({error})") from None
        if not record:  # also what a reader gives for records it does not have
            raise BadExample(f"{part.path}: record {position} is empty")
        return record

    def problems(self) -> Iterator[str]:
        """Files that cannot be read or have another number of records than they should."""
        files = {part.path: part.total for part in self.parts}
        for (path, total), found in zip(files.items(), _counts(list(files)), strict=True):
            name = os.path.basename(path)
            if isinstance(found, str):
                yield f"{name}: {found}"
            elif found != total:
                yield f"{name}: {found} records, expected {total}"


def _refuse(path: str | os.PathLike, problems: Iterator[str]) -> None:
    if bad := list(problems):
        raise UserError(f"data.path={path}: {len(bad)} files cannot be used: {some(bad)}")


class TfdsSource:
    """A split of a prepared TFDS dataset in array_record format.

    Its features image, text, label, mask and key are used, the first one is required. Reads without
    TensorFlow. Images stay encoded: the loader decodes them where it also crops.
    """

    def __init__(self, path: str | os.PathLike, split: str):
        """Open `split` ("train", "train[:10%]" ...) of the dataset directory `path`.

        Raises:
          UserError: no dataset there, no such split, an empty one, no image feature, or files whose
            records are not as many as the dataset says.
        """
        import tensorflow_datasets as tfds
        from etils import epath  # as TFDS does, so that gs:// paths work

        path = local_if_file_url(path)
        try:
            there = (epath.Path(path) / "dataset_info.json").exists()
            builder = tfds.builder_from_directory(path) if there else None
        except Exception as error:  # an unknown scheme; whatever parsers raise
            reason = printable(f"{type(error).__name__}: {error}")
            raise UserError(f"data.path={path}: no sound TFDS dataset ({reason})") from None
        if builder is None:
            raise UserError(f"data.path={path}: no TFDS dataset there (no dataset_info.json)")
        info = _split_info(builder.info.splits, path, split)
        _check_format(builder, path)
        self._about = {"kind": "tfds", "path": os.fspath(path), "split": split}
        self._features = builder.info.features
        self.fields = tuple(_known_features(self._features))
        if "image" not in self.fields:
            raise UserError(f"data.path={path}: no image feature, only {sorted(self._features)}")
        skip = tfds.decode.SkipDecoding()
        self._decoders = {name: skip for name in ("image", "mask") if name in self.fields}
        self._records = _Records(
            [
                _Part(os.fspath(f.filename), f.skip, f.take, f.examples_in_shard)
                for f in info.file_instructions
            ]
        )
        _refuse(path, self._records.problems())
        names = self._features["label"].names if "label" in self.fields else ()
        self.class_names = tuple(names)
        sizes = [(file.name, file.stat().length) for file in info.filepaths]
        about = (split, len(self), sizes, self.class_names, sample_images(self))
        self._fingerprint = digest("tfds", *about)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict:
        index = checked_index(index, len(self))
        record = self._records[index]
        try:
            found = self._features.deserialize_example_np(record, decoders=self._decoders)
            example = {name: _READ[name](found[name]) for name in self.fields}
        except MemoryError:
            raise
        except Exception as error:  # whatever parsers raise
            key = f"{self._about['split']}/{index}"
            raise BadExample(f"{key}: not as the features say ({error})") from None
        example.setdefault("key", f"{self._about['split']}/{index}")
        return example

    def fingerprint(self) -> str:
        """Of the split's files, number of examples, class names and a sample of its images."""
        return self._fingerprint

    def describe(self) -> dict[str, str | int]:
        """What a change of the data is shown with."""
        return self._about | {"examples": len(self), "shards": len(self._records.parts)}

    def problems(self) -> Iterator[str]:
        """Files that are damaged or have another number of records than the dataset says."""
        return self._records.problems()


def _check_format(builder, path: str | os.PathLike) -> None:
    file_format = builder.info.file_format.value
    if file_format != "array_record":
        raise UserError(
            f"data.path={path}: its file format is {file_format}, but only array_record can be "
            "read at random (see `tfds convert_format`)"
        )


def _split_info(splits, path: str | os.PathLike, split: str):
    try:
        info = splits[split]
    except (KeyError, ValueError, AssertionError):  # TFDS: unknown name, bad syntax, bad slice
        raise UserError(f"data.split={split!r}: {path} has {sorted(splits)}") from None
    if info.num_examples == 0:
        raise UserError(f"data.path={path}, data.split={split!r}: holds no examples")
    return info


# How a feature becomes a value of the example.
_READ = {
    "image": bytes,
    "mask": bytes,
    "text": lambda value: value.decode("utf-8"),
    "key": lambda value: value.decode("utf-8"),
    "label": int,
}


def _known_features(features) -> dict:
    """The features we understand; those of a known name but another type are left out."""
    from tensorflow_datasets import features as kinds

    kind = {
        "image": kinds.Image,
        "mask": kinds.Image,
        "text": kinds.Text,
        "key": kinds.Text,
        "label": kinds.ClassLabel,
    }
    return {n: features[n] for n in kind if n in features and isinstance(features[n], kind[n])}


class ArrayRecordSource:
    """ArrayRecord files with one example a record, in one of two layouts, told apart by themselves:

    - an encoded image and nothing else (JPEG, PNG, GIF, WEBP, BMP);
    - a serialized tf.train.Example (parsed without TensorFlow) with the encoded image in the bytes
      feature image/encoded, image, image_bytes, jpg or png; where present the caption in text,
      caption or txt (also image/caption, image/text), and the class number in label, cls or
      image/class/label, as an int64. Of lists, the first value counts.
    """

    class_names: tuple[str, ...] = ()  # a file of records names no classes

    def __init__(self, path: str | os.PathLike, split: str = ""):
        """Open the files of `path`: a directory, a glob or braces {00000..00007}.

        Local files, and gs:// by array_record's own reader where gcsfs is installed to list them;
        that reader knows no other remote files.

        Raises:
          UserError: no files, missing or damaged ones (all of them named), or no records.
        """
        self._about = {"kind": "arrayrecord", "path": os.fspath(path), "split": split}
        if is_remote(os.fspath(path)) and not os.fspath(path).startswith(("file://", "gs://")):
            raise UserError(f"data.path={path}: ArrayRecord files must be local or at gs://")
        shards = find_shards(path, split, SUFFIXES).files
        counts = _counts([shard.path for shard in shards])
        bad = (f"{s.name}: {n}" for s, n in zip(shards, counts, strict=True) if isinstance(n, str))
        _refuse(path, bad)
        parts = zip(shards, counts, strict=True)
        self._records = _Records([_Part(shard.path, 0, n, n) for shard, n in parts])
        self._names = {shard.path: printable(shard.name) for shard in shards}
        if not len(self):
            raise UserError(f"data.path={path}: {len(shards)} files without a record")
        about = [(shard.name, shard.size, n) for shard, n in zip(shards, counts, strict=True)]
        self._fingerprint = digest("arrayrecord", about, sample_bytes(shards))
        self.fields = self._sampled_fields()

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict:
        index = checked_index(index, len(self))
        part, position = self._records.place(index)
        key = f"{self._names[part.path]}/{position}"
        example = parse_record(self._records[index], key) | {"key": key}
        if "label" in self.fields and "label" not in example:
            raise BadExample(f"{key}: no label, though others have one")
        return {name: example[name] for name in self.fields if name in example}

    def _sampled_fields(self) -> tuple[str, ...]:
        """Those of the first records: all should have the same."""
        found = {"image": None, "key": None}
        for index in range(min(_SAMPLES, len(self))):
            with contextlib.suppress(BadExample):
                found |= dict.fromkeys(parse_record(self._records[index], ""))
        return tuple(found)

    def fingerprint(self) -> str:
        """Of the names, sizes and numbers of records of the files, and a sample of their bytes."""
        return self._fingerprint

    def describe(self) -> dict[str, str | int]:
        """What a change of the data is shown with."""
        return self._about | {"examples": len(self), "shards": len(self._records.parts)}

    def problems(self) -> Iterator[str]:
        """Files that are damaged or have another number of records than when they were opened."""
        return self._records.problems()


_IMAGE_NAMES = ("image/encoded", "image", "image_bytes", "jpg", "png")
_TEXT_NAMES = ("text", "caption", "txt", "image/caption", "image/text")
_LABEL_NAMES = ("label", "cls", "image/class/label")


def parse_record(record: bytes, key: str) -> dict:
    """The image, text and label of a record: see ArrayRecordSource.

    Raises:
      BadExample: neither an image nor a tf.train.Example with one.
    """
    if record.startswith(_IMAGE_STARTS):
        return {"image": record}
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_example_generated_pb2

    try:
        features = tf_example_generated_pb2.Example.FromString(record).features.feature
    except DecodeError:
        raise BadExample(f"{key}: neither an image nor a tf.train.Example") from None
    image = _first(features, _IMAGE_NAMES, "bytes_list")
    if image is None:
        names = some(sorted(features)) or "no features"
        raise BadExample(f"{key}: a tf.train.Example without an image (it has {names})")
    example = {"image": image}
    if (text := _first(features, _TEXT_NAMES, "bytes_list")) is not None:
        example["text"] = text.decode("utf-8", "replace")
    if (label := _first(features, _LABEL_NAMES, "int64_list")) is not None:
        example["label"] = label
    return example


def _first(features, names: Sequence[str], kind: str):
    """The first value of the first feature of these names that holds values of the kind."""
    values = (getattr(features[name], kind).value for name in names if name in features)
    return next((value[0] for value in values if value), None)
