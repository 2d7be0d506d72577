"""Tar shards against the library webdataset: the same samples, in the same order."""

import io
import tarfile

import pytest

from uta_jax.data.sources import TarSource

webdataset = pytest.importorskip("webdataset")
# It leaves its shards open.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


def test_samples_equal_those_of_webdataset(tmp_path):
    """Written by its ShardWriter, read by both."""
    with webdataset.ShardWriter(f"{tmp_path}/x-%05d.tar", maxcount=7, verbose=0) as writer:
        for n in range(20):
            sample = {"__key__": f"some/folder.d/{n:03d}", "jpg": b"image %d" % n, "cls": n % 3}
            writer.write(sample | {"txt": f"caption {n}", "json": {"caption": "other"}})
    source = TarSource(tmp_path)
    ours = [source[index] for index in range(len(source))]
    shards = sorted(map(str, tmp_path.glob("*.tar")))
    theirs = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert len(shards) == 3 and len(theirs) == 20
    assert [e["image"] for e in ours] == [t["jpg"] for t in theirs]
    assert [e["text"] for e in ours] == [t["txt"].decode() for t in theirs]
    assert [e["label"] for e in ours] == [int(t["cls"]) for t in theirs]
    assert [e["key"].split("/", 1)[1] for e in ours] == [t["__key__"] for t in theirs]


def test_odd_names_are_split_as_webdataset_splits_them(tmp_path):
    names = [
        "a.jpg",
        "b.c/d.jpg",
        "b.c/d.txt",
        "x/y.z.jpg",
        ".hidden.jpg",
        "x/.h.jpg",
        "plain",
        "E.JPG",
    ]
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
    source = TarSource(tmp_path)
    ours = {source[index]["key"].removeprefix("x/") for index in range(len(source))}
    samples = webdataset.WebDataset([f"{tmp_path}/x.tar"], shardshuffle=False)
    assert ours == {s["__key__"] for s in samples if "jpg" in s} == {"a", "b.c/d", "E"}
