"""A directory of image files as a source."""

import bisect
import errno
import hashlib
import itertools
import os
import stat
from array import array
from collections.abc import Iterator
from typing import NamedTuple

from uta_jax import UserError
from uta_jax.data import printable
from uta_jax.data.files import (
    IMAGE_SUFFIXES,
    checked_index,
    digest,
    is_remote,
    local_if_file_url,
    read_whole,
    sample_images,
    shown,
)

_SUFFIXES = tuple(os.fsencode(suffix) for suffix in IMAGE_SUFFIXES)


class ImageFolder:
    """Every image file below a directory, in sorted order of relative path.

    If all images lie in sub-directories, the first directory of the path is the class (its name,
    with underscores read as spaces). Links to files are read, links to directories not entered.

    Names may be any bytes; in keys, those that cannot be printed are escaped. Memory: about 8 bytes
    and the length of its name for each file, its directory not counted; while a directory is
    listed, some 80 bytes for each file in it.
    """

    def __init__(self, path: str | os.PathLike, split: str = ""):
        """List `path`, or its sub-directory `split` where one is given.

        Raises:
          UserError: not a directory, one that cannot be listed, or no image in it.
        """
        self._about = {"kind": "folder", "path": os.fspath(path), "split": split}
        root = os.path.join(local_if_file_url(path), split)
        where = f"data.path={path}, data.split={split!r}"
        if is_remote(root):
            raise UserError(f"{where}: a folder must be local; use tar, parquet or arrayrecord")
        if not os.path.isdir(root):
            raise UserError(f"{where}: {root} is not a directory")
        self._root = os.fsencode(root)
        self._list()
        if not len(self):
            raise UserError(
                f"data.path={root}: no images found (looked for {', '.join(IMAGE_SUFFIXES)})"
            )
        self._name_classes()
        self.fields = ("image", "key", *(("label",) if self.class_names else ()))
        self._fingerprint = digest("folder", self._listing, self.class_names, sample_images(self))

    def _list(self) -> None:
        """Fill the table of names: all in one piece of memory, without an object for each."""
        self._names, self._ends = bytearray(), array("Q")
        self._folders: list[bytes] = []  # in order; one may come several times, between its own
        self._starts = array("Q")  # the first file of each folder
        self._left_out = 0
        hashed = hashlib.sha256()
        for folder, files in itertools.groupby(_walk(self._root), key=lambda file: file.folder):
            for file in files:
                if file.size is None:
                    self._left_out += 1
                    continue
                if not self._folders or self._folders[-1] != folder:
                    self._folders.append(folder)
                    self._starts.append(len(self._ends))
                self._names += file.name
                self._ends.append(len(self._names))
                hashed.update(b"%b%b\0%d\0" % (folder, file.name, file.size))
        self._listing = hashed.hexdigest()

    def _name_classes(self) -> None:
        """Classes in order of their names, and the one of each folder."""
        tops = [folder.split(b"/", 1)[0] for folder in self._folders]
        classes = sorted(set(tops)) if all(tops) else []
        number = {name: index for index, name in enumerate(classes)}
        self._labels = array("L", (number[top] for top in tops)) if classes else None
        self.class_names = tuple(_text(name).replace("_", " ") for name in classes)

    def __len__(self) -> int:
        return len(self._ends)

    def _place(self, index: int) -> tuple[int, bytes]:
        """(number of the folder, path below the root) of a file."""
        folder = bisect.bisect_right(self._starts, index) - 1
        start = self._ends[index - 1] if index else 0
        return folder, self._folders[folder] + bytes(self._names[start : self._ends[index]])

    def __getitem__(self, index: int) -> dict:
        folder, name = self._place(checked_index(index, len(self)))
        example = {"image": read_whole(os.path.join(self._root, name)), "key": _text(name)}
        if self._labels is not None:
            example["label"] = self._labels[folder]
        return example

    def fingerprint(self) -> str:
        """Of the relative paths and sizes, and the content of 16 of the files."""
        return self._fingerprint

    def describe(self) -> dict[str, str | int]:
        """What a change of the data is shown with."""
        counts = {"examples": len(self), "classes": len(self.class_names)}
        return self._about | counts | {"left out": self._left_out}

    def problems(self) -> Iterator[str]:
        """What is left out, and what came or went since the folder was listed."""
        before = (self._place(index)[1] for index in range(len(self)))
        now = _walk(self._root)
        old = next(before, None)
        for file in now:
            name = file.folder + file.name
            if file.size is None:
                yield f"{shown(name)}: left out: a dangling link, or not a regular file"
                continue
            while old is not None and old < name:
                yield f"{shown(old)}: gone since the folder was listed"
                old = next(before, None)
            if old == name:
                old = next(before, None)
            else:
                yield f"{shown(name)}: new since the folder was listed"
        for name in itertools.chain(filter(None, [old]), before):
            yield f"{shown(name)}: gone since the folder was listed"


class _File(NamedTuple):
    folder: bytes  # below the root, with a slash at its end, or empty
    name: bytes
    size: int | None  # None for what is named like an image but cannot be one


def _text(name: bytes) -> str:
    return printable(os.fsdecode(name))


def _walk(root: bytes, folder: bytes = b"") -> Iterator[_File]:
    """What is named like an image below root, sorted by path; stays below root.

    Raises:
      UserError: a directory that cannot be listed. Left out, it could be a whole class.
    """
    place = os.path.join(root, folder)
    try:
        with os.scandir(place) as found:
            # Names alone are kept: the entries of one huge directory would take gigabytes. With
            # the slash they sort as whole paths do: "a-b/1.png" before "a/1.png".
            names = [
                entry.name + b"/" if is_dir else entry.name
                for entry in found
                if (is_dir := entry.is_dir(follow_symlinks=False))
                or entry.name.lower().endswith(_SUFFIXES)
            ]
        names.sort()
        for name in names:
            if name.endswith(b"/"):
                yield from _walk(root, folder + name)
            else:
                yield _File(folder, name, _size(os.path.join(place, name)))
    except OSError as error:
        raise UserError(f"{shown(place)}: cannot be listed ({error.strerror})") from None


def _size(path: bytes) -> int | None:
    try:
        about = os.stat(path)
    except OSError as error:
        # Went while the folder was listed, or a link to nowhere or in a circle.
        if error.errno in (errno.ENOENT, errno.ELOOP):
            return None
        raise
    return about.st_size if stat.S_ISREG(about.st_mode) else None
