"""ArrayRecord and parquet files."""

import errno
import json
import threading

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from example_data import (
    CLASSES,
    hugging_face_table,
    png,
    tf_example,
    write_parquets,
    write_record_files,
    write_records,
)

from uta_jax import UserError
from uta_jax.data import BadExample, parquet
from uta_jax.data.sources import ArrayRecordSource, ParquetSource


def test_records_are_images_or_tf_examples(tmp_path):
    records = [
        png(1),
        tf_example(image=png(2), caption="é".encode()),
        tf_example(jpg=png(3)),
        tf_example(audio=b""),
        b"\x01\xff nothing",
    ]
    write_records(tmp_path / "x.array_record", records)
    source = ArrayRecordSource(tmp_path / "x.array_record")
    assert source.fields == ("image", "key", "text")
    assert [source[n]["image"] for n in range(3)] == [png(1), png(2), png(3)]
    assert source[1] == {"image": png(2), "key": "x.array_record/1", "text": "é"}
    assert "text" not in source[0]
    with pytest.raises(BadExample, match="x.array_record/3.*without an image.*has audio"):
        source[3]
    with pytest.raises(BadExample, match="x.array_record/4: neither an image nor"):
        source[4]


def test_tf_examples_equal_the_tensorflow_layout_of_imagenet(tmp_path):
    record = tf_example(image__encoded=png(5), image__class__label=7, image__format=b"PNG")
    source = ArrayRecordSource(write_records(tmp_path / "x.arrayrecord", [record] * 2))
    assert source[1] == {"image": png(5), "label": 7, "key": "x.arrayrecord/1"}


def test_a_record_without_the_label_of_the_others_is_bad(tmp_path):
    records = [tf_example(image=png(1), label=0), tf_example(image=png(1))]
    source = ArrayRecordSource(write_records(tmp_path / "x.array_record", records))
    with pytest.raises(BadExample, match="no label"):
        source[1]


def test_array_records_must_be_local_or_at_gs(tmp_path):
    with pytest.raises(UserError, match="local or at gs://"):
        ArrayRecordSource("memory://bucket/x.array_record")
    assert len(ArrayRecordSource(f"file://{write_record_files(tmp_path)}")) == 12


def test_more_files_than_are_kept_open(tmp_path, monkeypatch):
    monkeypatch.setattr("uta_jax.data.records._OPEN_FILES", 2)
    source = ArrayRecordSource(write_record_files(tmp_path, files=5))
    assert [source[n]["text"] for n in [*range(20), *range(20)]] == [
        f"caption {n}" for n in [*range(20), *range(20)]
    ]
    assert len(source._records._readers._files) == 2


def test_parquet_classes_come_from_the_schema_and_splits_from_names(tmp_path):
    source = ParquetSource(write_parquets(tmp_path), "train")
    assert source.class_names == CLASSES and source.describe()["row groups"] == 6
    assert source[5]["key"] == "train-00001-of-00003.parquet/0/1"
    with pytest.raises(UserError, match="data.split='test': no .parquet files"):
        ParquetSource(tmp_path, "test")


@pytest.mark.parametrize(
    "columns, text",
    [
        ({"image": [png(1)]}, None),
        ({"jpg": [{"bytes": png(1), "path": "x.jpg"}], "txt": ["t"]}, "t"),
        ({"image": ["x.jpg"], "image_bytes": [png(1)], "captions": [["first", "second"]]}, "first"),
        ({"img": [png(1)], "caption": [None], "url": ["u"]}, None),
    ],
)
def test_parquet_columns_go_by_many_names(tmp_path, columns, text):
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    source = ParquetSource(tmp_path)
    assert source[0]["image"] == png(1) and source[0].get("text") == text
    assert source.class_names == ()


def test_parquet_mistakes_are_named(tmp_path):
    pq.write_table(pa.table({"url": ["x"], "image": ["y"]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="no image column, only url, image"):
        ParquetSource(tmp_path)
    nothing = [{"bytes": None, "path": "../x.png"}, {"bytes": png(), "path": None}]
    pq.write_table(pa.table({"image": nothing, "label": [1, None]}), tmp_path / "x.parquet")
    source = ParquetSource(tmp_path)
    with pytest.raises(BadExample, match="no image bytes, only the path '../x.png'"):
        source[0]
    with pytest.raises(BadExample, match="no label"):
        source[1]
    pq.write_table(pa.table({"jpg": [png()]}), tmp_path / "y.parquet")
    with pytest.raises(UserError, match="y.parquet has columns .'jpg'. .*differ"):
        ParquetSource(tmp_path)


def test_parquet_metadata_that_is_no_json_is_ignored(tmp_path):
    for about in (b"{", b"[]", json.dumps({"info": {"features": None}}).encode()):
        schema = pa.schema([("image", pa.binary())], metadata={"huggingface": about})
        pq.write_table(pa.table({"image": [png(1)]}, schema), tmp_path / "x.parquet")
        assert ParquetSource(tmp_path)[0]["image"] == png(1)


def test_parquet_keeps_few_row_groups(tmp_path, monkeypatch):
    source = ParquetSource(write_parquets(tmp_path))
    reads, read = [], source._groups._read
    monkeypatch.setattr(
        source._groups, "_read", lambda *place: (reads.append(place), read(*place))[1]
    )
    for index in range(len(source)):
        source[index]
    assert len(reads) == 6  # once each, in order
    size = source._groups[0].nbytes
    monkeypatch.setattr(parquet, "CACHE_BYTES", int(2.5 * size))
    source._groups._start()  # forgets those kept
    for index in range(len(source)):
        source[index]
        assert source._groups._bytes() <= 2.5 * size
    monkeypatch.setattr(parquet, "CACHE_BYTES", 0)
    source._groups._start()
    assert source[0]["text"] == "caption 0" and len(source._groups._tables) == 1
    monkeypatch.setattr(parquet, "LARGE_GROUP", 0)
    assert "read whole for every example" in [*source.problems()][-1]


def test_parquet_fingerprint_sees_the_values(tmp_path):
    def of(name, **changes):
        columns = {"images": [png(1)] * 2, "texts": ["a", "b"], "labels": [0, 1]} | changes
        (tmp_path / name).mkdir()
        pq.write_table(hugging_face_table(**columns), tmp_path / name / "x.parquet")
        return ParquetSource(tmp_path / name).fingerprint()

    assert of("one") == of("same")
    others = [of("2", texts=["a", "c"]), of("3", labels=[1, 1]), of("4", images=[png(2)] * 2)]
    assert len({of("5"), *others}) == 4


def test_remote_parquet_is_the_same_dataset(tmp_path):
    local = ParquetSource(write_parquets(tmp_path / "set"))
    memory = fsspec.filesystem("memory")
    memory.put(f"{tmp_path}/set/", "/parquets/", recursive=True)
    try:
        remote = ParquetSource("memory://parquets", "train")
        assert [remote[i] for i in range(12)] == [local[i] for i in range(12)]
        assert remote.fingerprint() == local.fingerprint()
    finally:
        memory.rm("/parquets", recursive=True)


def test_text_that_is_no_utf_8_is_a_bad_example(tmp_path):
    text = pa.array([b"caf\xe9", b"good"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"image": [png(1), png(2)], "text": text}), tmp_path / "x.parquet")
    source = ParquetSource(tmp_path)
    with pytest.raises(BadExample, match="x.parquet/0/0: .*utf-8"):
        source[0]
    assert source[1]["text"] == "good"


@pytest.mark.parametrize(
    "error, words",
    [
        (pa.ArrowMemoryError("malloc of 5 failed"), "no memory for row group 0"),
        (OSError(errno.ESTALE, "Stale file handle"), "cannot be read .Stale file handle"),
        (TimeoutError(), "cannot be read .TimeoutError"),
        (OSError("Corrupt snappy compressed data."), None),
    ],
)
def test_only_damaged_row_groups_are_bad_examples(error, words, tmp_path, monkeypatch):
    """What may pass ends the run: skipped, it would make other batches than without it."""

    class Failing:
        def read_row_group(self, *_, **__):
            raise error

    source = ParquetSource(write_parquets(tmp_path))
    source._groups._files = lambda path: (Failing(), threading.Lock())
    with pytest.raises(UserError, match=words or "row group 0 cannot be read") as found:
        source[0]
    assert isinstance(found.value, BadExample) == (words is None)
    source._groups.places = [("memory://x.parquet", 0)] * len(source._groups.places)
    source._names["memory://x.parquet"] = "x.parquet"
    with pytest.raises(UserError) as found:  # no error of a network says that data is damaged
        source[0]
    assert not isinstance(found.value, BadExample)
