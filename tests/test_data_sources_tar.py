"""Tar shards in webdataset layout, and their index."""

import os
import tarfile

import fsspec
import pytest
from example_data import CLASSES, grey, png, write_tar, write_tars

from uta_jax import UserError
from uta_jax.data import BadExample, tarbuild
from uta_jax.data.shards import expand_braces, find_shards
from uta_jax.data.sources import TarSource, build_index


def index_files(folder):
    return sorted(folder.glob("*.tarindex"))


def test_members_are_grouped_by_name_up_to_the_first_dot(tmp_path):
    write_tar(
        tmp_path / "a.tar",
        [
            ("./x/0.5.JPG", b"no image: 5.jpg is no extension"),
            ("./x/1.jpg", b"one"),
            ("y/1.txt", b"of y"),
            ("x/1.json", b'{"caption": "json"}'),
            ("x/1.seg.png", b"no image either"),
            ("y/1.webp", b"two"),
            ("README", b""),
            (".DS_Store", b""),
            ("z.png", b"worse"),
            ("z.jpg", b"better"),
            ("w.jpeg", b"three"),
            ("w.json", b'{"caption": 3, "text": "t"}'),
            ("w.txt", b"txt wins \xff"),
            ("v.png", b"four"),
            ("v.json", b"[]"),
            ("v.cls", b"2\n"),
        ],
    )
    source = TarSource(tmp_path)
    found = {e["key"]: (e["image"], e.get("text")) for e in map(source.__getitem__, range(5))}
    assert found == {
        "a/x/1": (b"one", "json"),
        "a/y/1": (b"two", "of y"),
        "a/z": (b"better", None),
        "a/w": (b"three", "txt wins �"),
        "a/v": (b"four", None),
    }
    assert len(source) == 5 and source.describe()["samples without an image"] == 1
    # One label of five is not a labelled set.
    assert source.fields == ("image", "key", "text") and "label" not in source[4]
    assert [*source.problems()] == ["a.tar: 1 samples without an image are left out, first x/0"]


def test_long_and_odd_names(tmp_path):
    """GNU and PAX headers; names that are no UTF-8, have line ends, or 300 letters."""
    names = ["n" * 300 + ".png", "\udcff\udcfe.png", "two\nlines.png", "日本.png"]
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / f"{form}.tar", "w", format=form) as tar:
            for value, name in enumerate(names):
                (tmp_path / "x.png").write_bytes(png(value))
                tar.add(tmp_path / "x.png", name)
    source = TarSource(tmp_path)
    keys = [source[index]["key"] for index in range(len(source))]
    expected = ["n" * 300, "\\udcff\\udcfe", "two\\nlines", "日本"]
    assert keys == [f"{form}/{name}" for form in (1, 2) for name in expected]
    assert [grey(source[index]) for index in range(8)] == [0, 1, 2, 3] * 2


def test_the_index_is_built_once(tmp_path, monkeypatch, capsys):
    source = TarSource(write_tars(tmp_path))
    (index,) = index_files(tmp_path)

    def never(shard):
        raise AssertionError(f"{shard} read again")

    monkeypatch.setattr(tarbuild, "scan", never)
    again = TarSource(tmp_path)
    assert again[7] == source[7] and again.fingerprint() == source.fingerprint()
    assert build_index(tmp_path, progress=False)["indexed"] == 0
    assert capsys.readouterr().err == ""
    assert index_files(tmp_path) == [index]


def test_build_index_says_what_it_did(tmp_path, capsys):
    summary = build_index(write_tars(tmp_path), progress=True)
    assert (summary["examples"], summary["shards"], summary["indexed"]) == (12, 3, 3)
    assert summary["index"] == str(index_files(tmp_path)[0])
    assert summary["bytes"] == os.path.getsize(summary["index"])
    assert "3/3" in capsys.readouterr().err


def test_processes_build_the_same_index(tmp_path, monkeypatch):
    one = build_index(write_tars(tmp_path / "one"), progress=False)
    monkeypatch.setattr(tarbuild, "_SERIAL_BYTES", 0)
    monkeypatch.setattr(tarbuild, "cpu_count", lambda: 2)
    write_tars(tmp_path / "two")
    for name in ("00000.tar", "00001.tar", "00002.tar"):
        about = os.stat(tmp_path / "one" / name)
        os.utime(tmp_path / "two" / name, ns=(about.st_atime_ns, about.st_mtime_ns))
    two = build_index(tmp_path / "two", progress=False)
    with open(one["index"], "rb") as first, open(two["index"], "rb") as second:
        assert first.read() == second.read()


def test_changed_and_new_shards_alone_are_read_again(tmp_path, monkeypatch, capsys):
    fingerprint = TarSource(write_tars(tmp_path)).fingerprint()
    write_tar(tmp_path / "00001.tar", {"new.png": png(200)})
    write_tar(tmp_path / "00003.tar", {"newer.png": png(201)})
    read, scan = [], tarbuild.scan
    monkeypatch.setattr(tarbuild, "scan", lambda shard: (read.append(shard.name), scan(shard))[1])
    source = TarSource(tmp_path)
    assert read == ["00001.tar", "00003.tar"]
    assert "1 changed (00001.tar), 1 new (00003.tar)" in capsys.readouterr().err
    assert [grey(source[i]) for i in range(len(source))] == [0, 1, 2, 3, 200, 8, 9, 10, 11, 201]
    assert source.fingerprint() != fingerprint
    (tmp_path / "00003.tar").unlink()
    assert len(TarSource(tmp_path)) == 9
    assert "1 gone (00003.tar)" in capsys.readouterr().err


def test_a_damaged_index_is_built_again(tmp_path, capsys):
    examples = len(TarSource(write_tars(tmp_path)))
    (index,) = index_files(tmp_path)
    whole = index.read_bytes()
    for broken in (b"", whole[:-30], whole[:50], whole[:-8] + b"other\n\n\n"):
        index.write_bytes(broken)
        assert len(TarSource(tmp_path)) == examples
        assert "not usable, built again" in capsys.readouterr().err
        assert index.read_bytes() == whole


def test_a_rebuilt_index_is_refused_by_those_who_use_the_old(tmp_path):
    source = TarSource(write_tars(tmp_path))
    reopen, names = source._index.__reduce__()  # what a pickled index does in another process
    assert len(reopen(*names)) == 12
    write_tar(tmp_path / "00002.tar", {"new.png": png(200)})
    TarSource(tmp_path)
    with pytest.raises(UserError, match="was rebuilt while it was in use"):
        reopen(*names)
    assert grey(source[0]) == 0  # the old index lives on for who has it open ...
    with pytest.raises(UserError, match="00002.tar: was changed while it was in use"):
        source[11]  # ... and does not read bytes that it was not made of


def test_the_index_of_read_only_shards_lies_in_the_cache(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("UTA_JAX_CACHE", str(cache))
    shards = write_tars(tmp_path / "shards")
    refused = tarbuild._writable
    monkeypatch.setattr(tarbuild, "_writable", lambda p: "cache" in p and refused(p))
    source = TarSource(shards)
    assert not index_files(shards) and len(index_files(cache)) == 1
    assert TarSource(shards).fingerprint() == source.fingerprint()
    monkeypatch.setattr(tarbuild, "_writable", lambda p: False)
    assert len(TarSource(shards)) == 12  # known already
    with pytest.raises(UserError, match="set UTA_JAX_CACHE to a directory that can"):
        TarSource(write_tars(tmp_path / "others"))


def test_fingerprint_sees_labels_captions_and_times(tmp_path):
    def of(name, change):
        shards = write_tars(tmp_path / name)
        members = {"0.png": png(1), "0.txt": b"a cat", "0.cls": b"0"} | change
        write_tar(shards / "00003.tar", members)
        return TarSource(shards).fingerprint()

    assert of("same", {}) == of("again", {})
    changes = [{}, {"0.cls": b"1"}, {"0.txt": b"a dog"}, {"0.png": png(2)}]
    assert len({of(f"{n}", change) for n, change in enumerate(changes)}) == len(changes)


def test_class_names(tmp_path):
    source = TarSource(write_tars(tmp_path))
    assert source.class_names == CLASSES and source[4]["label"] == 1
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    with pytest.raises(UserError, match="classnames.txt: 2 names, but labels up to 2"):
        TarSource(tmp_path)
    (tmp_path / "classnames.txt").unlink()
    source = TarSource(tmp_path)
    assert source.class_names == () and source[4]["label"] == 1


def test_broken_json_is_a_bad_example(tmp_path):
    write_tar(tmp_path / "a.tar", {"0.png": png(), "0.json": b"{", "1.png": png(), "1.json": b"{}"})
    source = TarSource(tmp_path)
    assert "text" not in source[1]
    with pytest.raises(BadExample, match="a/0.json: not JSON"):
        source[0]


def test_remote_shards_are_the_same_dataset(tmp_path, monkeypatch):
    """fsspec's in-memory file system stands for an object store."""
    monkeypatch.setenv("UTA_JAX_CACHE", str(tmp_path / "cache"))
    local = TarSource(write_tars(tmp_path / "shards"))
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "shards"), "/bucket", recursive=True)
    try:
        for name in memory.glob("/bucket/**/*.tarindex"):
            memory.rm(name)
        (folder,) = {name.rsplit("/", 1)[0] for name in memory.glob("/bucket/**/*.tar")}
        for pattern in ("", "/*.tar", "/{00000..00002}.tar"):
            remote = TarSource(f"memory://{folder}{pattern}")
            assert [remote[i] for i in range(12)] == [local[i] for i in range(12)]
            assert remote.fingerprint() == local.fingerprint()
        assert len(memory.glob(f"{folder}/*.tarindex")) == 3  # for other hosts
        for name in (tmp_path / "cache").iterdir():
            name.unlink()
        monkeypatch.setattr(tarbuild, "scan", None)
        assert TarSource(f"memory://{folder}")[3] == local[3]
        memory.rm(f"{folder}/00000.tar")
        with pytest.raises(UserError, match="00000.tar: cannot be read") as error:
            remote[0]
        assert not isinstance(error.value, BadExample)  # but the end of the run
        with pytest.raises(UserError, match="1 of 3 shards missing: 00000.tar"):
            TarSource(f"memory://{folder}/{{00000..00002}}.tar")
    finally:
        memory.rm("/bucket", recursive=True)


def test_file_urls_and_unknown_schemes(tmp_path):
    assert len(TarSource(f"file://{write_tars(tmp_path)}")) == 12
    with pytest.raises(UserError, match="nothing://x: cannot be opened"):
        TarSource("nothing://x")


def test_braces_stand_for_what_the_shell_says():
    assert expand_braces("a{08..11}b") == ["a08b", "a09b", "a10b", "a11b"]
    assert expand_braces("{a,b}/{1..2}") == ["a/1", "a/2", "b/1", "b/2"]
    assert expand_braces("plain") == ["plain"] and expand_braces("{x}") == ["{x}"]
    for pattern in ("{3..1}", "{0..99999999999}", "{000..999}{000..999}{0..9}"):
        with pytest.raises(UserError, match="at most|1 to"):
            expand_braces(pattern)


def test_split_is_a_directory_or_the_start_of_names(tmp_path):
    write_tars(tmp_path / "val", shards=1)
    for name in ("train-0.tar", "train_1.tar", "trainval-0.tar", "val-0.tar"):
        write_tar(tmp_path / name, {f"{name}.png": png()})
    names = [shard.name for shard in find_shards(tmp_path, "train", (".tar",)).files]
    assert names == ["train-0.tar", "train_1.tar"]
    assert len(TarSource(tmp_path, "val")) == 4
    with pytest.raises(UserError, match="data.split='test': no .tar files there"):
        TarSource(tmp_path, "test")
    with pytest.raises(UserError, match="set data.split=''"):
        TarSource(f"{tmp_path}/*.tar", "train")
