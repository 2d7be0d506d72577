"""Batch k is a function of (fingerprint, seed, k) alone."""

import hashlib
import io

import jax
import numpy as np
import pytest
from PIL import Image

from uta_jax import UserError
from uta_jax.data.loader import TrainLoader, eval_batches
from uta_jax.data.tokenizer import Tokenizer


class Memory:
    """n little pictures in memory; counts what was read."""

    class_names = ("even", "odd")

    def __init__(self, n, bad=None, text=True):
        self.n, self.bad, self.text, self.read = n, bad, text, []

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        self.read.append(int(index))
        pixels = np.random.default_rng(index).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        image = buffer.getvalue() if index != self.bad else b"GIF89a"
        example = {"image": image, "key": f"pic-{index}", "label": index % 2}
        return example | ({"text": f"picture {index}"} if self.text else {})

    def fingerprint(self):
        return f"memory{self.n}"


def loader(source=None, **options):
    defaults = {"batch_size": 8, "seed": 1, "image_size": 8, "crop_scale": (0.4, 1), "threads": 1}
    return TrainLoader(Memory(20) if source is None else source, **defaults | options)


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


ORDER = [
    10,
    5,
    7,
    3,
    8,
    18,
    9,
    2,
    0,
    15,
    6,
    1,
    4,
    17,
    13,
    19,
    16,
    12,
    14,
    11,
    16,
    8,
    9,
    3,
]  # ids of the first 24 rows, seed 1, 20 examples
DRAWS = [0.385255, 0.918002]  # of the crop at position 5

REFERENCE = 10  # batches of 8 from 20 examples: four epochs and their edges


@pytest.fixture(scope="module")
def reference():
    return digests(take(REFERENCE))


def test_batches_do_not_depend_on_threads(reference):
    for threads in (2, 5):
        assert digests(take(REFERENCE, threads=threads)) == reference


def test_batches_do_not_depend_on_where_the_run_was_resumed(reference):
    for start in range(REFERENCE):
        assert digests(take(REFERENCE - start, start_step=start)) == reference[start:]


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
    rng = np.random.default_rng([1, 5])
    assert rng.random(2).round(6).tolist() == DRAWS


def test_start_step_reads_nothing_before_it():
    source = Memory(40)
    take(1, source=source, start_step=2, threads=1)
    skipped = np.concatenate([batch["index"] for batch in take(2, source=Memory(40))])
    read = source.read[: 8 * 3]  # one batch out, two ahead; all in the first epoch
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


def test_sharding_gives_global_arrays_with_the_same_rows(reference):
    mesh = jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    if 8 % mesh.size:
        pytest.skip("8 rows do not divide over the devices")
    sharding = jax.NamedSharding(mesh, jax.P("data"))
    stream = loader(sharding=sharding)
    batch = next(stream)
    stream.close()
    assert all(isinstance(array, jax.Array) for array in batch.values())
    assert batch["image"].sharding.is_equivalent_to(sharding, 4)
    assert digests([jax.device_get(batch)]) == reference[:1]


def test_data_wait_is_measured():
    stream = loader()
    next(stream)
    assert 0 < stream.data_wait_s < 60
    stream.close()


def test_close_ends_the_iterator_and_may_be_called_twice():
    stream = loader()
    next(stream)
    stream.close()
    stream.close()
    with pytest.raises(StopIteration):
        next(stream)


def test_state_is_small_and_a_different_run_is_refused():
    stream = loader()
    state = stream.state(3)
    assert state == {"examples_seen": 24, "fingerprint": "memory20", "seed": 1, "batch_size": 8}
    stream.check_state(state)
    for field, value in [("fingerprint", "other"), ("seed", 7), ("batch_size", 4)]:
        with pytest.raises(UserError, match=f"{field}: .*{value}"):
            stream.check_state(state | {field: value})
    stream.close()


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"source": Memory(0)}, "no examples"),
        ({"source": Memory(5)}, "batch_size=8: the data has 5 examples"),
        ({"process_count": 3, "process_index": 0}, "divisible by the 3 processes"),
        ({"source": Memory(20, text=False), "tokenizer": Tokenizer(8)}, "captions"),
    ],
)
def test_impossible_requests_are_refused_at_once(options, reason):
    with pytest.raises(UserError, match=reason):
        loader(**options)


def test_bad_image_is_named():
    with pytest.raises(UserError, match="'pic-7': .*image"):
        take(3, source=Memory(20, bad=7))
    with pytest.raises(UserError, match="'pic-7': .*image"):
        list(eval_batches(Memory(20, bad=7), batch_size=8, image_size=8))


@pytest.mark.parametrize("n, batch_size", [(20, 8), (16, 8), (3, 8), (1, 1)])
def test_evaluation_sees_every_example_once_in_order(n, batch_size):
    batches = list(eval_batches(Memory(n), batch_size=batch_size, image_size=8))
    assert all(len(batch["image"]) == len(batch["valid"]) == batch_size for batch in batches)
    ids = np.concatenate([batch["index"][batch["valid"]] for batch in batches])
    assert ids.tolist() == [*range(n)]


def test_evaluation_refuses_an_empty_source_before_the_first_batch():
    with pytest.raises(UserError, match="no examples"):
        eval_batches(Memory(0), batch_size=8, image_size=8)
