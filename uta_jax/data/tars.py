"""Tar shards in webdataset layout as a source: any example by its index, nothing unpacked.

The members of an example share their name up to the first dot: 0001.jpg (or jpeg, png, webp, bmp,
gif), its caption 0001.txt or 0001.json (key "caption" or "text"), its class number 0001.cls (used
where all examples have one). A file classnames.txt beside the shards names the classes, one a line.
"""

import json
import os
from collections.abc import Iterator

from uta_jax import UserError
from uta_jax.data import BadExample, printable
from uta_jax.data import tarindex as ti
from uta_jax.data.files import (
    checked_index,
    digest,
    local_if_file_url,
    open_file,
    read_ranges,
)
from uta_jax.data.shards import find_shards, sample_bytes
from uta_jax.data.tarbuild import current_index, refuse_problems, scanned


class TarSource:
    """Examples of tar shards. Their index is built at first use and kept beside the shards."""

    def __init__(self, path: str | os.PathLike, split: str = "", progress: bool | None = None):
        """Open the shards of `path`: a directory, a glob, braces {00000..00007}, or a URL of these.

        Args:
          split: in a directory, a sub-directory or what the shards' names start with.
          progress: show a bar while indexing; by default on a terminal.

        Raises:
          UserError: no shards, missing or damaged ones (all of them named), or no examples.
        """
        self._about = {"kind": "tar", "path": os.fspath(path), "split": split}
        self._shards = find_shards(path, split, (".tar",))
        self._index, _ = current_index(self._shards, progress)
        entries = self._index.shards
        refuse_problems(self._shards, entries)
        self._texts = sum(entry.texts for entry in entries)
        # Labels that some lack are left out: they could not be batched.
        self._labelled = sum(entry.labels for entry in entries) == len(self._index)
        self.class_names = _class_names(self._shards.root, path, entries) if self._labelled else ()
        fields = {"text": self._texts, "label": self._labelled}
        self.fields = ("image", "key", *(name for name, has in fields.items() if has))
        parts = [(entry.name, entry.examples, entry.digest) for entry in entries]
        sample = sample_bytes(self._shards.files)
        self._fingerprint = digest("tar", parts, self.class_names, sample)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> dict:
        number, entry = self._index.find(checked_index(index, len(self)))
        shard = self._shards.files[number]
        places = [entry.image, entry.text] if entry.text_kind else [entry.image]
        image, *text = read_ranges(shard.path, places, (shard.size, shard.version))
        example = {"image": image, "key": f"{_stem(shard.name)}/{entry.key}"}
        if text and (found := _caption(text[0], entry.text_kind, example["key"])) is not None:
            example["text"] = found
        if self._labelled:
            example["label"] = entry.label
        return example

    def fingerprint(self) -> str:
        """Of the names, places, sizes, times of writing and labels of all members, and of a sample
        of their bytes; not of where the shards lie."""
        return self._fingerprint

    def describe(self) -> dict[str, str | int]:
        """What a change of the data is shown with."""
        return self._about | {
            "examples": len(self),
            "shards": len(self._shards.files),
            "bytes": sum(shard.size for shard in self._shards.files),
            "examples with text": self._texts,
            "samples without an image": sum(e.without_image[0] for e in self._index.shards),
        }

    def problems(self) -> Iterator[str]:
        """Read all shards again and compare them with the index; keys that several shards have."""
        scans = scanned(self._shards.files, progress=False)
        for entry, (found, data) in zip(self._index.shards, scans, strict=True):
            if found.problem:
                yield f"{entry.name}: {found.problem}"
            elif found.examples != entry.examples:
                yield f"{entry.name}: {entry.examples} examples in the index, {found.examples} now"
            elif found.digest != entry.digest or data != self._index.data(entry):
                yield f"{entry.name}: not what was indexed, though as many examples"
            if found.without_image[0]:
                count, key = found.without_image
                yield f"{entry.name}: {count} samples without an image are left out, first {key}"
        for key, first, second in ti.duplicates(self._index):
            yield f"{second}: key {key} is also in {first}"


def _stem(name: str) -> str:
    return printable(name.removesuffix(".tar"))


def _caption(data: bytes, kind: int, key: str) -> str | None:
    """None where the JSON has no caption."""
    if kind == ti.TXT:
        return data.decode("utf-8", "replace")
    try:
        about = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadExample(f"{key}.json: not JSON ({error})") from None
    texts = [about.get(name) for name in ("caption", "text")] if isinstance(about, dict) else []
    return next((text for text in texts if isinstance(text, str)), None)


def _class_names(root: str, path: str | os.PathLike, entries) -> tuple[str, ...]:
    """The lines of classnames.txt in the directory of the shards or in data.path."""
    classes = max(entry.classes for entry in entries)
    for folder in (root, local_if_file_url(path)):
        try:
            with open_file(f"{folder}/classnames.txt") as file:
                names = tuple(file.read().decode("utf-8", "replace").splitlines())
        except (FileNotFoundError, NotADirectoryError):
            continue
        if len(names) < classes:
            raise UserError(
                f"{folder}/classnames.txt: {len(names)} names, but labels up to {classes - 1}"
            )
        return names
    return ()
