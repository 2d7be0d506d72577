"""Sources: what they yield, what they refuse, when their fingerprint changes."""

import io
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from uta_jax import UserError
from uta_jax.data import emoji_scenes
from uta_jax.data.sources import ImageFolder, TfdsSource, open_source


def png(value=0, size=(8, 8)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def write(root, *names):
    for value, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(value))
    return root


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "scenes"
    counts = {"train": 40, "val_single": 8, "val_scenes": 4}
    return emoji_scenes.build(path, processes=1, progress=False, **counts)


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
    other = emoji_scenes.build(
        tmp_path / "other",
        train=40,
        val_single=8,
        val_scenes=4,
        seed=1,
        processes=1,
        progress=False,
    )
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
    write(tmp_path, "b_c/2.png", "a/x/9.PNG", "a/1.jpg")
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    source = ImageFolder(tmp_path)
    assert [source[i]["key"] for i in range(len(source))] == ["a/1.jpg", "a/x/9.PNG", "b_c/2.png"]
    assert [source[i]["label"] for i in range(3)] == [0, 0, 1]
    assert source.class_names == ("a", "b c")
    assert source[2]["image"] == (tmp_path / "b_c/2.png").read_bytes()


def test_folder_with_images_at_the_top_is_unlabelled(tmp_path):
    source = ImageFolder(write(tmp_path, "a/1.png", "2.png"))
    assert source.class_names == () and "label" not in source[0]


def test_folder_split_is_a_sub_directory(tmp_path):
    write(tmp_path, "train/a/1.png", "val/a/2.png", "val/b/3.png")
    assert open_source("folder", tmp_path, "val").class_names == ("a", "b")
    with pytest.raises(UserError, match="'test'.*not a directory"):
        open_source("folder", tmp_path, "test")


def test_folder_fingerprint_changes_with_names_sizes_and_counts(tmp_path):
    fingerprint = ImageFolder(write(tmp_path / "one", "a.png", "b.png")).fingerprint()
    assert ImageFolder(write(tmp_path / "two", "a.png", "b.png")).fingerprint() == fingerprint
    assert ImageFolder(write(tmp_path / "three", "a.png", "c.png")).fingerprint() != fingerprint
    assert ImageFolder(write(tmp_path / "four", "a.png")).fingerprint() != fingerprint
    (tmp_path / "two" / "b.png").write_bytes(png(1, (9, 9)) + b"!")
    assert ImageFolder(tmp_path / "two").fingerprint() != fingerprint


def test_folder_skips_dangling_links_and_pipes_and_ends_on_link_loops(tmp_path):
    write(tmp_path, "a.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing.png")
    (tmp_path / "loop").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    assert len(ImageFolder(tmp_path)) == 1


def test_folder_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match="no images found"):
        ImageFolder(tmp_path)
    with pytest.raises(UserError, match="not a directory"):
        ImageFolder(tmp_path / "missing")
    source = ImageFolder(write(tmp_path, "a.png"))
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match="a.png: cannot be read"):
        source[0]


def test_unknown_kind_lists_the_known():
    with pytest.raises(UserError, match="'zip'.*'folder', 'tfds'"):
        open_source("zip", "anywhere", "train")


def test_index_is_not_limited_to_python_integers(scenes):
    assert TfdsSource(scenes, "train")[np.int64(1)]["key"] == "train-0000001"
