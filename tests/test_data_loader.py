"""Batch k is a function of (fingerprint, seed, k) alone."""

import hashlib
import json
import time

import jax
import numpy as np
import pytest
from pictures import Pictures

from uta_jax import UserError
from uta_jax.data.examples import random_at
from uta_jax.data.loader import Reading, TrainLoader, eval_batches
from uta_jax.data.tokenizer import Tokenizer


def loader(source=None, start=0, threads=1, workers=0, **options):
    """A loader of tiny batches that goes on at batch `start`."""
    source = Pictures(20) if source is None else source
    defaults = {"batch_size": 8, "seed": 1, "image_size": 8, "crop_scale": (0.4, 1)}
    reading = Reading(workers, threads, timeout_s=60)
    stream = TrainLoader(source, reading=reading, **defaults | options)
    if start:
        stream.resume(stream.state() | {"examples_seen": start * 8})
    return stream


def take(count, **options):
    """The first `count` batches as host arrays."""
    stream = loader(**options)
    try:
        return [{name: np.asarray(a) for name, a in next(stream).items()} for _ in range(count)]
    finally:
        stream.close()


def digests(batches):
    """sha256 of ids and pixels of each batch."""
    return [
        hashlib.sha256(batch["index"].tobytes() + batch["image"].tobytes()).hexdigest()
        for batch in batches
    ]


# Ids of the first 24 rows, seed 1, 20 examples; draws of the crop at position 5.
ORDER = [10, 5, 7, 3, 8, 18, 9, 2, 0, 15, 6, 1, 4, 17, 13, 19, 16, 12, 14, 11, 16, 8, 9, 3]
DRAWS = [0.855041, 0.624782]

REFERENCE = 10  # batches of 8 from 20 examples: four epochs and their edges


@pytest.fixture(scope="module")
def reference():
    return digests(take(REFERENCE))


def test_batches_do_not_depend_on_threads_and_workers(reference):
    for options in ({"threads": 2}, {"threads": 5}, {"workers": 1}, {"workers": 3}):
        assert digests(take(REFERENCE, **options)) == reference, options


def test_batches_do_not_depend_on_where_the_run_was_resumed(reference):
    for start in range(REFERENCE):
        assert digests(take(REFERENCE - start, start=start)) == reference[start:]


def test_processes_own_contiguous_rows_of_the_same_global_batch(reference):
    for count in (2, 4, 8):
        parts = [take(REFERENCE, process_index=p, process_count=count) for p in range(count)]
        whole = [
            {name: np.concatenate([part[name] for part in step]) for name in step[0]}
            for step in zip(*parts, strict=True)
        ]
        assert digests(whole) == reference


def test_seed_changes_the_batches(reference):
    assert not set(digests(take(REFERENCE, seed=2))) & set(reference)


def test_every_example_once_an_epoch_and_epochs_in_other_orders():
    ids = np.concatenate([batch["index"] for batch in take(15)])
    epochs = ids.reshape(6, 20)
    assert all(sorted(epoch) == [*range(20)] for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 6


def test_crops_of_one_example_differ_between_epochs():
    crops = {}
    for batch in take(15):
        for index, image in zip(batch["index"].tolist(), batch["image"], strict=True):
            crops.setdefault(index, []).append(image.tobytes())
    assert all(len(set(of_one)) >= 5 for of_one in crops.values())


def test_order_is_the_one_recorded():
    """Recorded so that an upgrade of grain or numpy cannot silently reorder a resumed run.

    If a change is intended, paste the new values and say in the change log that runs cannot be
    resumed across it.
    """
    ids = np.concatenate([batch["index"] for batch in take(3)])
    assert ids.tolist() == ORDER
    rng = random_at(1, 5)
    assert [round(rng.random(), 6) for _ in range(2)] == DRAWS


def test_resuming_reads_nothing_of_what_was_seen():
    source = Pictures(40, read=[])
    take(1, source=source, start=2)
    skipped = np.concatenate([batch["index"] for batch in take(2, source=Pictures(40))])
    read = source.read[: 8 * 3]  # all in the first epoch
    assert len(read) >= 8 and not set(read) & set(skipped.tolist())


def test_fields_shapes_and_dtypes():
    batch = take(1, tokenizer=Tokenizer(16))[0]
    assert {name: (a.shape, a.dtype.name) for name, a in batch.items()} == {
        "image": ((8, 8, 8, 3), "uint8"),
        "index": ((8,), "int32"),
        "label": ((8,), "int32"),
        "text": ((8, 16), "int32"),
    }
    assert np.array_equal(batch["label"], batch["index"] % 2)
    assert np.array_equal(batch["text"], Tokenizer(16)([f"picture {i}" for i in batch["index"]]))
    assert "text" not in take(1)[0]


def test_text_is_the_same_from_worker_processes():
    one, other = (take(2, tokenizer=Tokenizer(16), workers=w) for w in (0, 1))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_sharding_gives_global_arrays_with_the_same_rows(reference):
    mesh = jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    if 8 % mesh.size:
        pytest.skip("8 rows do not divide over the devices")
    sharding = jax.NamedSharding(mesh, jax.P("data"))
    for workers in (0, 1):
        stream = loader(sharding=sharding, workers=workers)
        batches = [next(stream) for _ in range(6)]  # the slots are used twice
        stream.close()
        assert all(isinstance(array, jax.Array) for array in batches[0].values())
        assert batches[0]["image"].sharding.is_equivalent_to(sharding, 4)
        assert digests(map(jax.device_get, batches)) == reference[:6]


def test_data_wait_is_measured():
    stream = loader()
    next(stream)
    assert 0 < stream.data_wait_s < 60
    stream.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_batch_reaches_the_devices_while_nobody_asks_for_it(workers):
    """So the step and the loading overlap; tests/benchmarks/data_wait.py measures it."""
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    stream = loader(workers=workers, sharding=jax.NamedSharding(mesh, jax.P("data")))
    next(stream)
    ahead = stream._running[1]._queue
    deadline = time.monotonic() + 20
    while not ahead.full():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (batch, *_), error = ahead.queue[0]
    assert error is None and all(isinstance(array, jax.Array) for array in batch.values())
    assert next(stream) is batch
    stream.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_close_ends_the_iterator_and_may_be_called_twice(workers):
    stream = loader(workers=workers)
    next(stream)
    stream.close()
    stream.close()
    with pytest.raises(StopIteration):
        next(stream)


# The saved state


def test_the_state_is_small_and_a_different_run_is_refused_with_a_diff():
    stream = loader()
    for _ in range(3):
        next(stream)
    state = json.loads(json.dumps(stream.state()))
    assert state == {
        "examples_seen": 24,
        "bad_examples": 0,
        "fingerprint": "pictures20",
        "seed": 1,
        "batch_size": 8,
        "source": {"kind": "pictures", "examples": 20},
    }
    stream.close()
    assert loader().resume(state) == ""
    changes = [
        ({"source": Pictures(30)}, "fingerprint: pictures20 -> pictures30; examples: 20 -> 30"),
        ({"seed": 7}, "seed: 1 -> 7"),
        ({"batch_size": 4}, "batch_size: 8 -> 4"),
    ]
    for options, diff in changes:
        with pytest.raises(UserError, match=f"{diff}.*--allow_data_change.*24 examples") as error:
            loader(**options).resume(state)
        assert "\n" not in str(error.value)


def test_a_change_that_is_allowed_goes_on_after_as_many_examples():
    state = loader().state() | {"examples_seen": 24}
    stream = loader(batch_size=4)
    assert stream.resume(state, allow_change=True) == "batch_size: 8 -> 4"
    ids = np.concatenate([next(stream)["index"] for _ in range(2)])
    assert ids.tolist() == take(4)[3]["index"].tolist()
    assert stream.state()["examples_seen"] == 32
    stream.close()


def test_data_that_only_moved_is_the_same():
    state = loader().state()
    assert loader().resume(state | {"source": {"kind": "pictures", "path": "elsewhere"}}) == ""


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"source": Pictures(0)}, "no examples"),
        ({"source": Pictures(5)}, "batch_size=8: the data has 5 examples"),
        ({"process_count": 3, "process_index": 0}, "divisible by the 3 processes"),
        ({"source": Pictures(20, text=False), "tokenizer": Tokenizer(8)}, "captions"),
    ],
)
def test_impossible_requests_are_refused_at_once(options, reason):
    with pytest.raises(UserError, match=reason):
        loader(**options)


# Bad examples


@pytest.mark.parametrize("kind", ["bad", "lost"])
def test_a_bad_example_is_replaced_and_all_others_stay(kind, tmp_path):
    path = tmp_path / "bad_examples.jsonl"
    whole = take(REFERENCE)
    source = Pictures(20, **{kind: (7,)})
    runs = []
    for workers in (0, 2):
        path.unlink(missing_ok=True)
        stream = loader(source, workers=workers, bad_file=path)
        runs.append([next(stream) for _ in range(REFERENCE)])
        assert stream.bad_examples == stream.state()["bad_examples"] == 4  # once an epoch
        stream.close()
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert digests(runs[0]) == digests(runs[1])
    where = np.concatenate([batch["index"] for batch in whole]) == 7
    assert [row["position"] for row in rows] == np.flatnonzero(where).tolist()
    assert {row["index"] for row in rows} == {7}
    assert {row["key"] for row in rows} == {"pic-7" if kind == "bad" else "example 7"}
    for name in ("index", "image"):
        one, other = (np.concatenate([b[name] for b in run]) for run in (whole, runs[0]))
        assert np.array_equal(one[~where], other[~where])
    assert 7 not in other[where] and len(other) == len(where)


def test_the_count_of_bad_examples_survives_a_resume(tmp_path):
    path = tmp_path / "bad_examples.jsonl"
    stream = loader(Pictures(20, bad=(7,)), bad_file=path)
    for _ in range(REFERENCE):
        next(stream)
    whole = path.read_text()
    stream.close()
    path.unlink()
    stream = loader(Pictures(20, bad=(7,)), bad_file=path)
    for _ in range(4):
        next(stream)
    state = stream.state()
    for _ in range(3):
        next(stream)  # lost to an interruption; what they wrote is not counted twice
    stream.close()
    with path.open("a") as file:
        file.write('{"position": 61, "ind')  # killed while it wrote
    again = loader(Pictures(20, bad=(7,)), bad_file=path)
    again.resume(state)
    assert again.bad_examples == state["bad_examples"] > 0
    for _ in range(REFERENCE - 4):
        next(again)
    again.close()
    assert path.read_text() == whole and again.bad_examples == 4
    fresh = loader(Pictures(20, bad=(7,)), bad_file=path)  # killed before it saved anything
    for _ in range(REFERENCE):
        next(fresh)
    fresh.close()
    assert path.read_text() == whole


def test_every_process_lists_its_own_bad_examples(tmp_path):
    for process in range(2):
        stream = loader(
            Pictures(20, bad=(7,)), bad_file=tmp_path / "bad.jsonl", process_index=process,
            process_count=2,
        )  # fmt: skip
        for _ in range(REFERENCE):
            next(stream)
        stream.close()
    one, other = ((tmp_path / name).read_text() for name in ("bad.jsonl", "bad-1.jsonl"))
    assert len(one.splitlines()) + len(other.splitlines()) == 4 and one != other


class Labels(Pictures):
    """Example 3 has a label that is none."""

    odd = -1

    def __getitem__(self, index):
        return super().__getitem__(index) | ({"label": self.odd} if index == 3 else {})


@pytest.mark.parametrize("odd, trains", [(-1, True), (2, True), (2**40, False)])
def test_a_label_of_no_class_counts_in_no_evaluation(odd, trains, capsys):
    """Training takes what fits: splits without labels have -1."""
    source = Labels(20)
    source.odd = odd
    valid = [b["valid"] for b in eval_batches(source, batch_size=8, image_size=8)]
    assert np.flatnonzero(~np.concatenate(valid)[:20]).tolist() == [3]
    assert f"label {odd} is not in 0 .. 1" in capsys.readouterr().err
    stream = loader(source)
    labels = np.concatenate([next(stream)["label"] for _ in range(3)])
    stream.close()
    assert (odd in labels) == trains and (stream.bad_examples > 0) != trains


def test_an_example_without_a_caption_is_bad_where_captions_are_wanted():
    class Some(Pictures):
        def __getitem__(self, index):
            example = super().__getitem__(index)
            return example if index != 3 else {k: v for k, v in example.items() if k != "text"}

    stream = loader(Some(20), tokenizer=Tokenizer(8))
    ids = np.concatenate([next(stream)["index"] for _ in range(3)])
    assert 3 in ORDER and 3 not in ids
    assert stream.bad_examples >= 1
    stream.close()


# Evaluation


@pytest.mark.parametrize("n, batch_size", [(20, 8), (16, 8), (3, 8), (1, 1)])
def test_evaluation_sees_every_example_once_in_order(n, batch_size):
    batches = list(eval_batches(Pictures(n), batch_size=batch_size, image_size=8))
    assert all(len(batch["image"]) == len(batch["valid"]) == batch_size for batch in batches)
    ids = np.concatenate([batch["index"][batch["valid"]] for batch in batches])
    assert ids.tolist() == [*range(n)]


@pytest.mark.parametrize("n, batch_size, count", [(10, 6, 3), (13, 12, 4), (2, 8, 8), (12, 6, 2)])
def test_evaluation_over_processes_is_that_of_one(n, batch_size, count):
    """Also where a process has nothing but filling to do."""
    options = {"batch_size": batch_size, "image_size": 8}
    whole = list(eval_batches(Pictures(n), **options))
    parts = [
        list(eval_batches(Pictures(n), process_index=p, process_count=count, **options))
        for p in range(count)
    ]
    assert {len(part) for part in parts} == {len(whole)}
    for batch, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        joined = {name: np.concatenate([piece[name] for piece in pieces]) for name in batch}
        valid = batch["valid"]
        assert np.array_equal(joined["valid"], valid)
        for name in batch:
            assert np.array_equal(joined[name][valid], batch[name][valid])


def test_evaluation_refuses_an_empty_source_before_the_first_batch():
    with pytest.raises(UserError, match="no examples"):
        eval_batches(Pictures(0), batch_size=8, image_size=8)
    with pytest.raises(UserError, match="divisible by the 3 processes"):
        eval_batches(Pictures(9), batch_size=8, image_size=8, process_index=0, process_count=3)


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_leaves_bad_examples_out_and_names_them(workers, capsys):
    source = Pictures(20, bad=(3,), lost=(17,))
    reading = Reading(workers=workers)
    batches = list(eval_batches(source, batch_size=8, image_size=8, reading=reading))
    ids = np.concatenate([batch["index"][batch["valid"]] for batch in batches])
    assert ids.tolist() == [i for i in range(20) if i not in (3, 17)]
    line = capsys.readouterr().err
    assert "2 of 20 examples" in line and "'pic-3', 'example 17'" in line and line.count("\n") == 1


def test_evaluation_of_nothing_but_bad_examples_is_an_error():
    with pytest.raises(UserError, match="3 of 3 examples cannot be used: 'pic-0'"):
        list(eval_batches(Pictures(3, bad=(0, 1, 2)), batch_size=2, image_size=8))
