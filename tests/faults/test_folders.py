"""Files that go, are locked or have odd names, rows 25-29 of the list of faults.

Each test shows its fault first.
"""

import copy
import errno
import json
import os
import shutil
import stat
import tarfile
import tempfile
from pathlib import Path

import pytest
from example_data import (
    png,
    write_folders,
    write_images,
    write_parquets,
    write_record_files,
    write_tars,
)

from uta_jax import UserError
from uta_jax.data import BadExample
from uta_jax.data.loader import TrainLoader
from uta_jax.data.sources import ArrayRecordSource, ImageFolder, ParquetSource, TarSource

NOBODY = 65534


@pytest.fixture
def no_rights():
    """A directory that all may enter, and this process without the rights of root."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o755)
    was = os.geteuid()
    yield folder, lambda: os.seteuid(NOBODY) if was == 0 else None
    os.seteuid(was)
    shutil.rmtree(folder)


def keys(source):
    return [source[index]["key"] for index in range(len(source))]


# Row 25: a file deleted between listing and read.


def test_file_deleted_after_listing(tmp_path):
    source = ImageFolder(write_images(tmp_path, "a.png", "b.png"))
    (tmp_path / "a.png").unlink()
    with pytest.raises(FileNotFoundError):
        os.stat(tmp_path / "a.png")
    with pytest.raises(BadExample, match="a.png: cannot be read .No such file"):
        source[0]
    assert source[1]["key"] == "b.png"
    assert [*source.problems()] == ["a.png: gone since the folder was listed"]


def test_file_added_after_listing_is_no_part_of_it(tmp_path):
    source = ImageFolder(write_images(tmp_path, "b.png"))
    write_images(tmp_path, "a.png", "c.png")
    assert len(os.listdir(tmp_path)) == 3 and keys(source) == ["b.png"]
    assert [*source.problems()] == [
        "a.png: new since the folder was listed",
        "c.png: new since the folder was listed",
    ]


@pytest.mark.parametrize(
    "kind, write, name",
    [
        (TarSource, write_tars, "00001.tar"),
        (ArrayRecordSource, write_record_files, "x.array_record-00001-of-00003"),
        (ParquetSource, write_parquets, "train-00001-of-00003.parquet"),
    ],
)
def test_a_shard_deleted_after_opening_ends_the_run(kind, write, name, tmp_path):
    """Thousands of examples are not to be skipped one by one."""
    source = copy.deepcopy(kind(write(tmp_path)))  # with no file open yet, as in a worker
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError):
        os.stat(tmp_path / name)
    with pytest.raises(UserError, match=f"{name}: cannot be read .*No such file") as error:
        source[4]
    assert not isinstance(error.value, BadExample)
    assert source[3]["key"]
    assert any(line.startswith(f"{name}: c") for line in source.problems())


@pytest.mark.parametrize("kind, write", [(TarSource, write_tars), (ImageFolder, write_folders)])
@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EMFILE])
def test_trouble_that_may_pass_makes_no_bad_example(kind, write, number, tmp_path, monkeypatch):
    source, pread = kind(write(tmp_path)), os.pread

    def failing(descriptor, count, offset):
        if not os.readlink(f"/proc/self/fd/{descriptor}").endswith("index"):
            raise OSError(number, os.strerror(number))
        return pread(descriptor, count, offset)

    monkeypatch.setattr(os, "pread", failing)
    with pytest.raises(UserError, match="cannot be read") as error:
        source[4]
    assert not isinstance(error.value, BadExample)
    assert ("ulimit -n" in str(error.value)) == (number == errno.EMFILE)


def test_a_run_goes_on_without_the_files_it_cannot_read(no_rights):
    """Rows 25, 26 and 28 through the loader: each is counted, listed, and replaced."""
    root, become_nobody = no_rights
    images = [f"{n}.png" for n in range(8)]
    write_images(root, *images)
    source = ImageFolder(root)
    (root / "2.png").unlink()
    (root / "3.png").chmod(0)
    (root / "4.png").unlink()
    (root / "4.png").symlink_to("nothing.png")
    (root / "out").mkdir()
    (root / "out").chmod(0o777)
    listed = root / "out" / "bad.jsonl"
    stream = TrainLoader(
        source, batch_size=8, seed=1, image_size=8, crop_scale=(0.4, 1), max_bad_fraction=1,
        bad_file=listed, process_index=0, process_count=1,
    )  # fmt: skip
    become_nobody()
    used = next(stream)["index"].tolist()
    stream.close()
    assert len(used) == 8 and not {2, 3, 4} & set(used) and stream.bad_examples >= 3
    rows = [json.loads(line) for line in listed.read_text().splitlines()]
    found = {row["index"]: row["reason"] for row in rows}
    assert sorted(found) == [2, 3, 4] and "2.png: cannot be read (No such file" in found[2]
    assert "Permission denied" in found[3] and "4.png: cannot be read" in found[4]


# Row 26: permission denied.


def test_file_without_permission(no_rights):
    root, become_nobody = no_rights
    write_images(root, "a.png", "b.png")
    (root / "a.png").chmod(0)
    source = ImageFolder(root)
    become_nobody()
    with pytest.raises(PermissionError):
        open(root / "a.png", "rb")
    with pytest.raises(BadExample, match="a.png: cannot be read .Permission denied"):
        source[0]
    assert source[1]["key"] == "b.png"
    assert ImageFolder(root).fingerprint()  # can be opened all the same


def test_directory_without_permission(no_rights):
    """Left out it would be a class less; so it is no single bad example."""
    root, become_nobody = no_rights
    write_images(root, "cat/a.png", "dog/b.png")
    (root / "dog").chmod(0)
    become_nobody()
    with pytest.raises(PermissionError):
        os.listdir(root / "dog")
    with pytest.raises(UserError, match="/dog/?: cannot be listed .Permission denied"):
        ImageFolder(root)


def test_shard_without_permission(no_rights, monkeypatch):
    root, become_nobody = no_rights
    monkeypatch.setenv("UTA_JAX_CACHE", str(root / "cache"))
    (root / "cache").mkdir()
    (root / "cache").chmod(0o777)
    write_tars(root / "shards")
    (root / "shards" / "00002.tar").chmod(0)
    become_nobody()
    with pytest.raises(PermissionError):
        tarfile.open(root / "shards" / "00002.tar")
    with pytest.raises(UserError, match="1 of 3 shards.*00002.tar: cannot be read .Permission"):
        TarSource(root / "shards")


# Rows 27 and 28: links that loop, links to nothing; and pipes.


def test_link_loops(tmp_path):
    write_images(tmp_path, "a.png")
    (tmp_path / "up").symlink_to(tmp_path)
    (tmp_path / "one.png").symlink_to("two.png")
    (tmp_path / "two.png").symlink_to("one.png")
    assert (tmp_path / "up" / "up" / "up" / "a.png").exists()
    with pytest.raises(OSError) as loop:
        os.stat(tmp_path / "one.png")
    assert loop.value.errno == errno.ELOOP
    source = ImageFolder(tmp_path)
    assert keys(source) == ["a.png"] and source.describe()["left out"] == 2
    assert [line.split(":")[0] for line in source.problems()] == ["one.png", "two.png"]


def test_dangling_links_and_pipes(tmp_path):
    write_images(tmp_path / "in", "a.png")
    write_images(tmp_path / "out", "secret.png")
    (tmp_path / "in" / "gone.png").symlink_to("nothing.png")
    (tmp_path / "in" / "folder").symlink_to(tmp_path / "out")
    (tmp_path / "in" / "real.png").symlink_to("a.png")
    os.mkfifo(tmp_path / "in" / "pipe.png")
    assert os.path.lexists(tmp_path / "in" / "gone.png")
    assert not os.path.exists(tmp_path / "in" / "gone.png")
    source = ImageFolder(tmp_path / "in")
    assert keys(source) == ["a.png", "real.png"]  # the listing never leaves the root
    assert source.describe()["left out"] == 2
    assert sum("left out: a dangling link" in line for line in source.problems()) == 2


def test_file_that_became_a_pipe_does_not_block(tmp_path):
    source = ImageFolder(write_images(tmp_path, "a.png"))
    (tmp_path / "a.png").unlink()
    os.mkfifo(tmp_path / "a.png")
    assert stat.S_ISFIFO(os.stat(tmp_path / "a.png").st_mode)
    with pytest.raises(BadExample, match="a.png: not a regular file"):
        source[0]


# Row 29: names that are no UTF-8, hold line ends, or are as long as names can be.


def test_odd_names(tmp_path):
    names = [b"\xff\xfe.png", b"two\nlines \x1b[31m.png", b"n" * 251 + b".png", "日本.png".encode()]
    folder = os.fsencode(tmp_path) + b"/cl\xe9ss"
    os.mkdir(folder)
    for name in names:
        with open(os.path.join(folder, name), "wb") as file:
            file.write(png(1))
    with pytest.raises(UnicodeDecodeError):
        names[0].decode()
    assert len(names[2]) == 255
    source = ImageFolder(tmp_path)
    assert sorted(keys(source)) == sorted(
        f"cl\\udce9ss/{name}"
        for name in (
            "\\udcff\\udcfe.png",
            "two\\nlines \\x1b[31m.png",
            "n" * 251 + ".png",
            "日本.png",
        )
    )
    assert source.class_names == ("cl\\udce9ss",)
    for key in keys(source):
        json.dumps(key).encode()
        assert key.isprintable()
    shutil.rmtree(folder)
    with pytest.raises(BadExample) as error:
        source[2]
    assert str(error.value).isprintable()
