"""The emoji_scenes dataset: what is drawn, that it is deterministic, whole or absent."""

import io
import subprocess
import sys

import emoji
import numpy as np
import pytest
from PIL import Image

from uta_jax import UserError
from uta_jax.data import emoji_scenes
from uta_jax.data.sources import TfdsSource

SMALL = {"train": 300, "val_single": 128, "val_scenes": 20, "progress": False}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return emoji_scenes.build(tmp_path_factory.mktemp("data") / "scenes", processes=1, **SMALL)


def mask_of(example):
    return np.asarray(Image.open(io.BytesIO(example["mask"])))


def visible_classes(example):
    """{class name: visible pixels}"""
    values, counts = np.unique(mask_of(example), return_counts=True)
    pairs = zip(values.tolist(), counts.tolist(), strict=True)
    return {emoji_scenes.class_names[value - 1]: count for value, count in pairs if value}


def test_128_distinct_classes_with_cldr_names_and_drawings():
    codes, names = zip(*emoji_scenes.CLASSES, strict=True)
    assert len(set(codes)) == len(set(names)) == 128
    for code, name in emoji_scenes.CLASSES:
        assert emoji.demojize(chr(int(code, 16))).strip(":").replace("_", " ") == name
    drawings = [emoji_scenes._drawing(label) for label in range(128)]
    assert len({drawing.tobytes() for drawing in drawings}) == 128
    assert min(np.count_nonzero(emoji_scenes._visible(drawing)) for drawing in drawings) > 500


@pytest.mark.parametrize(
    "names, words",
    [
        (["owl"], "an owl"),
        (["red apple", "soccer ball"], "a red apple and a soccer ball"),
        (["dog", "scissors", "ice skate"], "a dog, scissors and an ice skate"),
    ],
)
def test_caption(names, words):
    assert emoji_scenes.caption(names) == words


def test_scene_depends_on_seed_split_and_index_alone():
    scene = emoji_scenes.example(3, "train", 7, 80)
    assert emoji_scenes.example(3, "train", 7, 80) == scene
    for other in [(4, "train", 7, 80), (3, "val_scenes", 7, 80), (3, "train", 8, 80)]:
        assert emoji_scenes.example(*other)["image"] != scene["image"]


def test_label_caption_and_mask_agree_and_the_labelled_object_is_clearly_largest():
    counts = []
    for index in range(300):
        example = emoji_scenes.example(0, "train", index, 80)
        classes = visible_classes(example)
        largest, *others = sorted(classes.values(), reverse=True)
        assert classes[emoji_scenes.class_names[example["label"]]] == largest
        assert all(other <= 0.75 * largest for other in others)
        words = example["text"].replace(" and ", ", ").split(", ")
        assert sorted(words) == sorted(emoji_scenes.phrase(name) for name in classes)
        counts.append(len(classes))
    share = np.bincount(counts, minlength=5)[1:] / 300
    assert share[0] > share[1] > share[2] > share[3] > 0.03


def test_single_objects_are_balanced_and_fill_40_to_90_percent_of_the_side():
    examples = [emoji_scenes.example(0, "val_single", index, 80) for index in range(256)]
    assert [example["label"] for example in examples] == [*range(128)] * 2
    sides = []
    for example in examples:
        rows, columns = np.nonzero(mask_of(example))
        sides.append((1 + max(np.ptp(rows), np.ptp(columns))) / 80)
    assert (
        0.35 < min(sides) < 0.45 and 0.85 < max(sides) <= 0.91
    )  # edge pixels are half transparent


def test_built_dataset_holds_the_scenes_in_order_and_tfds_decodes_them(built):
    import tensorflow_datasets as tfds

    for split in emoji_scenes.SPLITS:
        source = TfdsSource(built, split)
        assert len(source) == SMALL[split]
        for index in (0, len(source) - 1):
            assert source[index] == emoji_scenes.example(0, split, index, 80)
    decoded = tfds.builder_from_directory(built).as_data_source("train")[0]
    assert decoded["image"].shape == (80, 80, 3) and decoded["mask"].shape == (80, 80, 1)
    assert "tensorflow" not in sys.modules


def test_number_of_processes_does_not_matter(built, tmp_path):
    other = emoji_scenes.build(tmp_path / "scenes", processes=2, **SMALL)
    for split in emoji_scenes.SPLITS:
        one, two = TfdsSource(built, split), TfdsSource(other, split)
        assert [one[i] for i in range(len(one))] == [two[i] for i in range(len(two))]
        assert one.fingerprint() == two.fingerprint()


def test_card_names_licence_and_classes(built):
    card = (built / "README.md").read_text()
    assert "OpenMoji" in card and "CC BY-SA 4.0" in card and "Food & Drink: crab, red apple" in card
    assert all(name in card for name in emoji_scenes.class_names)


def test_complete_dataset_is_reused_with_a_message(built, capsys, monkeypatch):
    monkeypatch.setattr(emoji_scenes, "_write", None)  # would fail if called
    assert emoji_scenes.build(built, **SMALL) == built
    assert "already built" in capsys.readouterr().out


def test_other_content_is_refused_and_kept(built, tmp_path):
    with pytest.raises(UserError, match="'train': 300.*remove it"):
        emoji_scenes.build(built, **SMALL | {"train": 10})
    (tmp_path / "thesis.txt").write_text("dear")
    with pytest.raises(UserError, match="choose another directory"):
        emoji_scenes.build(tmp_path, **SMALL)
    with pytest.raises(UserError, match="choose another directory"):
        emoji_scenes.build(tmp_path / "thesis.txt", **SMALL)
    assert (tmp_path / "thesis.txt").read_text() == "dear"


@pytest.mark.parametrize("number", ["train", "val_single", "val_scenes", "size"])
def test_numbers_too_small_are_refused(tmp_path, number):
    with pytest.raises(UserError, match=f"{number}=0: must be at least"):
        emoji_scenes.build(tmp_path / "scenes", **SMALL | {number: 0})


def test_interrupted_build_leaves_nothing_behind(tmp_path, monkeypatch):
    draw = emoji_scenes.example

    def interrupted(seed, split, index, size):
        if (split, index) == ("val_single", 60):
            raise KeyboardInterrupt
        return draw(seed, split, index, size)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(emoji_scenes, "example", interrupted)
        emoji_scenes.build(tmp_path / "scenes", processes=1, **SMALL)
    assert list(tmp_path.iterdir()) == []
    emoji_scenes.build(tmp_path / "scenes", processes=1, **SMALL)
    assert len(TfdsSource(tmp_path / "scenes", "val_single")) == 128


def test_drawing_imports_neither_jax_nor_tensorflow_nor_torch():
    code = (
        "import sys; from uta_jax.data.emoji_scenes import example; example(0, 'train', 0, 80);"
        "assert not {'jax', 'tensorflow', 'torch', 'grain'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
