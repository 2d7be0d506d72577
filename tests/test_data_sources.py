"""Sources: what they yield, what they refuse, when their fingerprint changes."""

import contextlib
import copy
import json
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pytest
from example_data import (
    CLASSES,
    grey,
    write_folders,
    write_images,
    write_parquets,
    write_record_files,
    write_tars,
)

from uta_jax import UserError
from uta_jax.data import BadExample, emoji_scenes
from uta_jax.data.sources import (
    SOURCES,
    ImageFolder,
    Mixture,
    SyntheticSource,
    TfdsSource,
    open_mixture,
    open_source,
)

SCENES = {"train": 40, "val_single": 8, "val_scenes": 4}
WRITERS = {
    "arrayrecord": write_record_files,
    "folder": write_folders,
    "parquet": write_parquets,
    "tar": write_tars,
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "scenes"
    return emoji_scenes.build(path, processes=1, progress=False, **SCENES)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory, scenes):
    """(path, split) of a small dataset of every kind."""
    root = tmp_path_factory.mktemp("sets")
    written = {kind: (str(write(root / kind)), "") for kind, write in WRITERS.items()}
    return written | {"tfds": (str(scenes), "train"), "synthetic": ("8x9:12", "")}


@pytest.fixture(params=sorted(SOURCES))
def source(request, datasets):
    return open_source(request.param, *datasets[request.param])


def everything(source):
    return [source[index] for index in range(len(source))]


def test_every_kind_keeps_the_contract(source):
    examples = everything(source)
    assert len(examples) in (12, 40)
    for example in examples:
        assert set(example) == set(source.fields)
        assert type(example["image"]) is bytes and type(example["key"]) is str
        assert source.class_names[example["label"]] if source.class_names else True
    assert len({example["key"] for example in examples}) == len(examples)
    assert source[np.int64(3)] == examples[3]  # as grain and numpy give indices
    for outside in (-1, len(source)):
        with pytest.raises(IndexError):
            source[outside]
    about = source.describe()
    assert about["examples"] == len(source) and about["kind"] in SOURCES
    assert json.loads(json.dumps(about)) == about
    assert not list(source.problems())


@pytest.mark.parametrize("kind", sorted(WRITERS))
def test_examples_are_those_that_were_written(kind, datasets):
    examples = everything(open_source(kind, *datasets[kind]))
    examples.sort(key=grey)
    assert [grey(example) for example in examples] == list(range(12))
    assert [example["label"] for example in examples] == [n % len(CLASSES) for n in range(12)]
    if kind != "folder":
        assert [example["text"] for example in examples] == [f"caption {n}" for n in range(12)]


def test_threads_and_other_processes_read_the_same(source):
    examples = everything(source)
    order = [*range(len(source)), *reversed(range(len(source)))] * 3
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.__getitem__, order)) == [examples[i] for i in order]
    assert everything(copy.deepcopy(source)) == examples


def in_a_fork(function, *args):
    """function(*args) in a forked process, which inherits the arguments as they are."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=lambda: there.send(function(*args)))
    child.start()
    try:
        assert here.poll(20), "the forked process hangs or died"
        return here.recv()
    finally:
        child.kill()
        child.join()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*fork.*:RuntimeWarning")
@pytest.mark.parametrize("kind", sorted(SOURCES))
def test_forked_processes_read_the_same(kind, datasets):
    """After the parent has read, so that what it holds open must not be used by the child."""
    source = open_source(kind, *datasets[kind])
    examples = everything(source)
    with contextlib.ExitStack() as stack:
        if kind in ("arrayrecord", "tfds"):  # as if other threads were reading at that moment
            stack.enter_context(source._records._readers._lock)
        if kind == "parquet":
            stack.enter_context(source._groups._lock)
            stack.enter_context(source._groups._files._lock)
        assert in_a_fork(everything, source) == examples


def test_spawned_processes_read_the_same(datasets):
    sources = [open_source(kind, *where) for kind, where in datasets.items()]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert list(pool.map(everything, sources)) == list(map(everything, sources))


@pytest.mark.parametrize("kind", sorted(WRITERS))
def test_fingerprint_follows_content_not_place(kind, tmp_path):
    root = WRITERS[kind](tmp_path / "one")
    fingerprint = open_source(kind, root, "").fingerprint()
    moved = shutil.copytree(root, tmp_path / "moved" / "deeper")
    assert open_source(kind, moved, "").fingerprint() == fingerprint
    assert open_source(kind, moved, "").describe() != open_source(kind, root, "").describe()
    fewer = WRITERS[kind](tmp_path / "fewer", examples=3)
    assert open_source(kind, fewer, "").fingerprint() != fingerprint


def test_tfds_examples_stay_encoded_and_slices_work(scenes):
    source = TfdsSource(scenes, "train")
    example = source[3]
    assert example == emoji_scenes.example(0, "train", 3, 80)
    assert source.class_names == emoji_scenes.class_names
    part = open_source("tfds", scenes, "train[10:20]")
    assert len(part) == 10 and part[0] == source[10]


def test_tfds_fingerprint_follows_content_not_place(scenes, tmp_path):
    fingerprint = TfdsSource(scenes, "train").fingerprint()
    moved = shutil.copytree(scenes, tmp_path / "moved")
    assert TfdsSource(moved, "train").fingerprint() == fingerprint
    assert TfdsSource(scenes, "train[:20]").fingerprint() != fingerprint
    # Same counts, and file sizes that ArrayRecord pads to the same length.
    other = tmp_path / "other"
    emoji_scenes.build(other, seed=1, processes=1, progress=False, **SCENES)
    assert TfdsSource(other, "train").fingerprint() != fingerprint


def test_tfds_mistakes_are_named(scenes, tmp_path):
    with pytest.raises(UserError, match="no TFDS dataset there"):
        TfdsSource(tmp_path, "train")
    for split in ("training", "train[:200%]", ""):
        with pytest.raises(UserError, match="has .'train', 'val_scenes', 'val_single'."):
            TfdsSource(scenes, split)
    with pytest.raises(UserError, match="holds no examples"):
        open_source("tfds", scenes, "train[:0]")


def test_folder_is_sorted_recursive_and_labelled_by_sub_directory(tmp_path):
    write_images(tmp_path, "b_c/2.png", "a/x/9.PNG", "a/1.jpg", "a-b/3.png", "a/z.png")
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    source = ImageFolder(tmp_path)
    keys = [example["key"] for example in everything(source)]
    assert keys == sorted(keys) == ["a-b/3.png", "a/1.jpg", "a/x/9.PNG", "a/z.png", "b_c/2.png"]
    assert [example["label"] for example in everything(source)] == [1, 0, 0, 0, 2]
    assert source.class_names == ("a", "a-b", "b c")
    assert source[4]["image"] == (tmp_path / "b_c/2.png").read_bytes()


def test_folder_with_images_at_the_top_is_unlabelled(tmp_path):
    source = ImageFolder(write_images(tmp_path, "a/1.png", "2.png"))
    assert source.class_names == () and "label" not in source[0]


def test_folder_split_is_a_sub_directory(tmp_path):
    write_images(tmp_path, "train/a/1.png", "val/a/2.png", "val/b/3.png")
    assert open_source("folder", tmp_path, "val").class_names == ("a", "b")
    with pytest.raises(UserError, match="'test'.*not a directory"):
        open_source("folder", tmp_path, "test")


def test_folder_fingerprint_changes_with_names_sizes_and_bytes(tmp_path):
    def opened(name, *files):
        return ImageFolder(write_images(tmp_path / name, *files)).fingerprint()

    fingerprint = opened("one", "a.png", "b.png")
    assert opened("two", "a.png", "b.png") == fingerprint
    assert len({fingerprint, opened("three", "a.png", "c.png"), opened("four", "a.png")}) == 3
    data = bytearray((tmp_path / "two" / "b.png").read_bytes())
    data[-20] ^= 1
    (tmp_path / "two" / "b.png").write_bytes(data)
    assert ImageFolder(tmp_path / "two").fingerprint() != fingerprint


def test_folder_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match="no images found"):
        ImageFolder(tmp_path)
    with pytest.raises(UserError, match="not a directory"):
        ImageFolder(tmp_path / "missing")
    with pytest.raises(UserError, match="must be local"):
        ImageFolder("gs://bucket/images")


def test_synthetic_examples_never_change_and_say_how_to_ask_for_them():
    source = SyntheticSource("40x30:1000000000", "train")
    assert len(source) == 10**9 and source[64]["image"] == source[0]["image"] != source[1]["image"]
    other = SyntheticSource("40x30:1000000000", "val")
    assert other[0]["image"] != source[0]["image"] and other.fingerprint() != source.fingerprint()
    assert len(SyntheticSource()) == 100_000
    for path in ("40x30", "0x30:5", "40x30:0", "/data/images"):
        with pytest.raises(UserError, match="WIDTHxHEIGHT:EXAMPLES"):
            SyntheticSource(path)
    for path in ("9999x9999:100", "2x4000:100"):  # seconds each to draw, and then refused
        with pytest.raises(UserError, match=f"{path}: image of .* pixels"):
            SyntheticSource(path)


class Numbers:
    """Examples n, n + 1 ... n + count - 1; the first of them is bad."""

    class_names = ("a", "b")
    fields = ("image", "key", "label")

    def __init__(self, first, count, class_names=("a", "b")):
        self.first, self.count, self.class_names = first, count, class_names

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index == 0:
            raise BadExample("bad")
        return {"image": b"%d" % (self.first + index), "key": str(index), "label": 0}

    def fingerprint(self):
        return f"{self.first} {self.count}"

    def describe(self):
        return {"kind": "numbers", "examples": self.count}

    def problems(self):
        yield "a fault"


@pytest.mark.parametrize(
    "lengths, weights, counts",
    [
        ((10, 40), (1, 1), (40, 40)),
        ((10, 40), (1, 4), (10, 40)),
        ((10, 40), (0.9, 0.1), (360, 40)),
        ((7, 3, 5), (2, 2, 1), (10, 10, 5)),
        ((3,), (5,), (3,)),
    ],
)
def test_mixture_gives_every_part_its_share_and_every_example_its_turn(lengths, weights, counts):
    parts = [Numbers(1000 * n, length) for n, length in enumerate(lengths)]
    mixture = Mixture(parts, weights)
    assert len(mixture) == sum(counts)
    seen = dict.fromkeys(((n, i) for n, length in enumerate(lengths) for i in range(length)), 0)
    for index in range(len(mixture)):
        try:
            value = int(mixture[index]["image"])
            seen[divmod(value, 1000)] += 1
        except BadExample:
            continue
    for (part, example), times in seen.items():
        turns = counts[part] / lengths[part]
        assert times == 0 if example == 0 else int(turns) <= times <= -(-turns // 1)


def test_mixture_drops_what_the_parts_do_not_share(datasets):
    parts = [("tar", *datasets["tar"], 1.0), ("folder", *datasets["folder"], 2)]
    mixture = open_mixture(parts)
    assert mixture.class_names == CLASSES and set(mixture.fields) == {"image", "key", "label"}
    assert len(mixture) == 36 and all(set(e) == set(mixture.fields) for e in everything(mixture))
    other = Mixture([Numbers(0, 5), Numbers(0, 5, ("b", "a"))], [1, 1])
    assert other.class_names == () and "label" not in other[1]
    assert [*other.problems()] == ["part 0: a fault", "part 1: a fault"]
    assert everything(copy.deepcopy(mixture)) == everything(mixture)


def test_mixture_fingerprint_and_description(datasets):
    def of(*weights):
        kinds = [(kind, *datasets[kind]) for kind in ("tar", "folder")]
        return open_mixture([(*k, w) for k, w in zip(kinds, weights, strict=True)])

    assert of(1, 2).fingerprint() == of(2, 4).fingerprint() != of(2, 1).fingerprint()
    about = of(1, 2).describe()
    assert about["examples"] == 36 and about["1.kind"] == "folder" and about["1.weight"] == "2.0"


def test_mixture_mistakes_are_named(datasets):
    with pytest.raises(UserError, match="weights.*-1"):
        open_mixture([("tar", *datasets["tar"], 1), ("folder", *datasets["folder"], -1)])
    with pytest.raises(UserError, match="0 sources"):
        open_mixture([])


def test_unknown_kind_lists_the_known():
    with pytest.raises(UserError, match="'zip'.*'folder'.*'tar', 'tfds'"):
        open_source("zip", "anywhere", "train")


def test_bad_examples_are_one_printable_line():
    error = BadExample("x\n\x1b[31m\udcff é")
    assert str(error) == "x\\n\\x1b[31m\\udcff é" and isinstance(error, UserError)
    assert str(copy.deepcopy(error)) == str(error)
