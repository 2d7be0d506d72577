"""Broken datasets, rows 33-39 of the list of faults. Each test shows its fault first."""

import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest
from array_record.python.array_record_module import ArrayRecordReader
from example_data import (
    png,
    write_parquets,
    write_record_files,
    write_tar,
    write_tars,
)

from uta_jax import UserError
from uta_jax.data import BadExample, emoji_scenes
from uta_jax.data.sources import (
    ArrayRecordSource,
    ParquetSource,
    TarSource,
    TfdsSource,
)


def keys(source):
    return [source[index]["key"] for index in range(len(source))]


# Row 33: the count in the index is not the number of records.


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    counts = {"train": 40, "val_single": 8, "val_scenes": 4}
    path = tmp_path_factory.mktemp("data") / "scenes"
    return emoji_scenes.build(path, processes=1, progress=False, **counts)


def test_tfds_index_with_another_count(scenes, tmp_path):
    wrong = shutil.copytree(scenes, tmp_path / "wrong")
    about = json.loads((wrong / "dataset_info.json").read_text())
    (train,) = (split for split in about["splits"] if split["name"] == "train")
    assert train["shardLengths"] == ["40"]
    train["shardLengths"] = ["41"]
    (wrong / "dataset_info.json").write_text(json.dumps(about))
    (file,) = wrong.glob("*train*")
    assert ArrayRecordReader(str(file)).num_records() == 40
    with pytest.raises(UserError, match=f"{file.name}: 40 records, expected 41"):
        TfdsSource(wrong, "train")


def test_tar_index_with_another_count(tmp_path):
    """The same size and time of writing, as after a copy that keeps times."""
    source = TarSource(write_tars(tmp_path))
    about = os.stat(tmp_path / "00001.tar")
    write_tar(tmp_path / "00001.tar", {"0.png": png(), "1.png": png(), "2.png": png()})
    os.truncate(tmp_path / "00001.tar", about.st_size)
    os.utime(tmp_path / "00001.tar", ns=(about.st_atime_ns, about.st_mtime_ns))
    now = os.stat(tmp_path / "00001.tar")
    assert (now.st_size, now.st_mtime_ns) == (about.st_size, about.st_mtime_ns)
    with tarfile.open(tmp_path / "00001.tar") as tar:
        assert len(tar.getnames()) == 3
    assert [*source.problems()] == ["00001.tar: 4 examples in the index, 3 now"]


def test_array_record_and_parquet_with_another_count(tmp_path):
    records = ArrayRecordSource(write_record_files(tmp_path / "records"))
    tables = ParquetSource(write_parquets(tmp_path / "tables"))
    shutil.rmtree(tmp_path / "records")
    shutil.rmtree(tmp_path / "tables")
    file = write_record_files(tmp_path / "records", examples=5) / "x.array_record-00000-of-00003"
    write_parquets(tmp_path / "tables", examples=5)
    assert ArrayRecordReader(str(file)).num_records() == 5
    assert [*records.problems()][0] == f"{file.name}: 5 records, expected 4"
    assert [*tables.problems()][0].endswith("not what was opened, 5 rows now")


# Row 34: shards that are cut off.


@pytest.mark.parametrize("part", [0.0, 0.3, 0.5, 0.9])
def test_truncated_array_record(part, tmp_path):
    root = write_record_files(tmp_path)
    name = "x.array_record-00001-of-00003"
    size = os.path.getsize(root / name)
    os.truncate(root / name, int(part * size))
    if part:  # what makes this dangerous: no error, and no records
        assert ArrayRecordReader(str(root / name)).num_records() == 0
    with pytest.raises(UserError, match=f"1 files cannot be used: {name}: cut off or damaged"):
        ArrayRecordSource(root)


def test_truncated_tfds(scenes, tmp_path):
    root = shutil.copytree(scenes, tmp_path / "cut")
    (file,) = root.glob("*train*")
    os.truncate(file, os.path.getsize(file) // 2)
    assert ArrayRecordReader(str(file)).num_records() == 0
    with pytest.raises(UserError, match=f"{file.name}: cut off or damaged"):
        TfdsSource(root, "train")


def test_truncated_tar_at_any_byte(tmp_path):
    """tarfile itself takes many of these for whole archives with fewer members."""
    whole = write_tars(tmp_path / "whole", shards=1) / "00000.tar"
    data, silent = whole.read_bytes(), 0
    with tarfile.open(whole) as tar:
        last = max(member.offset_data + member.size for member in tar)
    for cut in [*range(0, last, 700), *range(512, last, 512), last]:
        path = tmp_path / f"{cut}" / "x.tar"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data[:cut])
        try:
            with tarfile.open(path) as tar:
                silent += len(tar.getnames()) < 12
        except tarfile.TarError:
            pass
        with pytest.raises(UserError, match="1 of 1 shards cannot be used: x.tar: .*(cut|empty)"):
            TarSource(path.parent)
    assert silent > 5


def test_damaged_and_foreign_tars_are_all_named(tmp_path):
    root = write_tars(tmp_path, shards=7)
    data = bytearray((root / "00001.tar").read_bytes())
    with tarfile.open(root / "00001.tar") as tar:
        third = tar.getmembers()[2]
    data[third.offset : third.offset + 512] = b"\xff" * 512
    (root / "00001.tar").write_bytes(data)
    with tarfile.open(root / "00001.tar") as tar:
        assert len(tar.getnames()) == 2  # no error, ten members less
    (root / "00002.tar").write_bytes(b"<html>404</html>" * 100)
    with tarfile.open(root / "00003.tar", "w:gz") as tar:
        tar.add(root / "00004.tar")
    whole = (root / "00005.tar").read_bytes()
    (root / "00005.tar").write_bytes(whole * 2)
    with tarfile.open(root / "00005.tar") as tar:
        assert len(tar.getnames()) == 12  # of 24
    with pytest.raises(UserError) as error:
        TarSource(root)
    for part in (
        "4 of 7 shards cannot be used",
        "00001.tar: damaged: no header of a member at byte",
        "00002.tar: not a tar file",
        "00003.tar: compressed (gzip)",
        "00005.tar: holds data behind the end",
    ):
        assert part in str(error.value)
    write_tars(root, shards=7)  # mended
    assert len(TarSource(root)) == 28


def test_truncated_parquet(tmp_path):
    root = write_parquets(tmp_path)
    name = "train-00002-of-00003.parquet"
    os.truncate(root / name, os.path.getsize(root / name) // 2)
    assert not (root / name).read_bytes().endswith(b"PAR1")
    with pytest.raises(UserError, match=f"1 files cannot be used: {name}: cut off or damaged"):
        ParquetSource(root)


def test_records_damaged_in_place_are_bad_examples(tmp_path):
    """The rest of the file stays readable."""
    root = write_record_files(tmp_path, files=1)
    file = root / "x.array_record-00000-of-00001"
    source = ArrayRecordSource(root)
    at = file.read_bytes().index(b"caption 2")
    with open(file, "r+b") as opened:
        opened.seek(at)
        opened.write(b"CAPTION")
    assert b"CAPTION 2" in file.read_bytes()
    with pytest.raises(BadExample, match="record 2"):
        source[2]
    assert source[1]["text"] == "caption 1"


def test_a_damaged_tfds_record_is_a_bad_example(scenes, tmp_path):
    """Though it is one of those that the fingerprint looks at."""
    root = shutil.copytree(scenes, tmp_path / "damaged")
    (file,) = root.glob("*train*")
    at = file.read_bytes().index(TfdsSource(root, "train")[0]["image"][:64])
    with open(file, "r+b") as opened:
        opened.seek(at + 100)
        opened.write(b"damaged")
    source = TfdsSource(root, "train")
    with pytest.raises(BadExample, match="record 0 cannot be read"):
        source[0]
    assert source[1]["label"] is not None and len(source) == 40


def test_tfds_descriptions_that_cannot_be_read(scenes, tmp_path):
    root = shutil.copytree(scenes, tmp_path / "garbage")
    (root / "features.json").unlink()
    with pytest.raises(UserError, match="no sound TFDS dataset"):
        TfdsSource(root, "train")
    (root / "dataset_info.json").write_text("garbage")
    with pytest.raises(UserError, match="no sound TFDS dataset") as error:
        TfdsSource(root, "train")
    assert "\n" not in str(error.value)
    assert len(TfdsSource(f"file://{scenes}", "train")) == 40


# Row 35: keys that come twice.


def test_duplicate_members_in_a_shard(tmp_path):
    write_tar(tmp_path / "a.tar", [("0.png", png(1)), ("1.png", png(2)), ("0.PNG", png(3))])
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert [name.lower() for name in tar.getnames()].count("0.png") == 2
    with pytest.raises(UserError, match="a.tar: duplicate member '0.PNG'"):
        TarSource(tmp_path)


def test_duplicate_keys_in_two_shards(tmp_path):
    """Told apart by their shards when training, and named by the check."""
    write_tar(tmp_path / "a.tar", {"0.png": png(1), "1.png": png(2)})
    write_tar(tmp_path / "b.tar", {"1.png": png(2), "2.png": png(3)})
    source = TarSource(tmp_path)
    with tarfile.open(tmp_path / "a.tar") as a, tarfile.open(tmp_path / "b.tar") as b:
        assert set(a.getnames()) & set(b.getnames()) == {"1.png"}
    assert keys(source) == ["a/0", "a/1", "b/1", "b/2"]
    assert [*source.problems()] == ["b.tar: key 1 is also in a.tar"]


# Row 36: a shard is missing.


@pytest.mark.parametrize(
    "source, write, gone, pattern",
    [
        (TarSource, write_tars, "00001.tar", "/{00000..00002}.tar"),
        (ArrayRecordSource, write_record_files, "x.array_record-00002-of-00003", ""),
        (ArrayRecordSource, write_record_files, "x.array_record-00000-of-00003", "/*"),
        (ParquetSource, write_parquets, "train-00001-of-00003.parquet", ""),
    ],
)
def test_missing_shard(source, write, gone, pattern, tmp_path):
    root = write(tmp_path)
    assert len(source(f"{root}{pattern}")) == 12
    (root / gone).unlink()
    assert gone not in os.listdir(root)
    with pytest.raises(UserError, match=f"1 of 3 shards missing: {gone}"):
        source(f"{root}{pattern}")


def test_part_of_a_numbered_set_can_be_asked_for(tmp_path):
    write_parquets(tmp_path)
    (tmp_path / "train-00002-of-00003.parquet").unlink()
    assert len(ParquetSource(f"{tmp_path}/train-{{00000..00001}}-of-00003.parquet")) == 8
    assert len(ParquetSource(tmp_path / "train-00001-of-00003.parquet")) == 4


def test_missing_tfds_shard(scenes, tmp_path):
    root = shutil.copytree(scenes, tmp_path / "part")
    (file,) = root.glob("*train*")
    file.unlink()
    assert not list(root.glob("*train*"))
    with pytest.raises(UserError, match=f"{file.name}: cannot be read .No such file"):
        TfdsSource(root, "train")


# Rows 37-39: tars whose members lead outside.


def link(name, target, kind):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    "member, words",
    [
        ("../evil.png", "'../evil.png' points outside"),
        ("a/../../evil.png", "points outside"),
        ("/tmp/evil.png", "'/tmp/evil.png' has an absolute path"),
        (link("evil.png", "/etc/passwd", tarfile.SYMTYPE), "is a link .to '/etc/passwd'"),
        (link("evil.png", "0.png", tarfile.LNKTYPE), "is a link .to '0.png'"),
        (link("evil.png", "", tarfile.FIFOTYPE), "not a plain file"),
        (link("evil.png", "", tarfile.CHRTYPE), "not a plain file"),
    ],
)
def test_hostile_members(member, words, tmp_path):
    data = b"" if isinstance(member, tarfile.TarInfo) else png(1)
    path = write_tar(tmp_path / "in" / "x.tar", [("0.png", png()), (member, data)])
    with tarfile.open(path) as tar:
        (hostile,) = (found for found in tar if "evil" in found.name)
        out = tmp_path / "out"
        assert not (out / hostile.name).resolve().is_relative_to(out) or not hostile.isreg()
    before = set(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=f"1 of 1 shards.*x.tar: member .*{words}.*refused"):
        TarSource(tmp_path / "in")
    assert set(tmp_path.rglob("*")) == before  # no index, either
    assert not Path("/tmp/evil.png").exists()
