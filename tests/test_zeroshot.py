"""The zero-shot protocol, step by step."""

import types

import numpy as np
import pytest

from uta_jax import UserError
from uta_jax.config import default_config, reading_of
from uta_jax.data.loader import Reading
from uta_jax.evals import names
from uta_jax.evals.features import Pooled
from uta_jax.evals.zeroshot import class_weights, prompts, scores

CLASSES = tuple("abcdefg")


def _unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _pooled(feature_ne, label_n):
    label_n = np.asarray(label_n, np.int32)
    return Pooled(np.asarray(feature_ne, np.float32), np.arange(len(label_n)), label_n)


def test_prompts_keep_the_templates_of_a_class_together():
    assert prompts(["dog", "owl"], ["a {}", "{}!"]) == ["a dog", "dog!", "a owl", "owl!"]


def test_class_weights_normalise_average_normalise():
    features = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    expected = _unit(_unit(features).reshape(3, 2, 5).mean(1))
    np.testing.assert_allclose(class_weights(features, 2), expected, atol=1e-6)
    # The long feature of a class must not drown the short one.
    features[::2] *= 100
    np.testing.assert_allclose(class_weights(features, 2), expected, atol=1e-6)


def test_top5_is_not_top1_and_classes_without_examples_are_told_of(capsys):
    features = np.arange(7, 0, -1, dtype=np.float32)[None].repeat(6, axis=0)
    found = scores(np.eye(7, dtype=np.float32), _pooled(features, [0, 0, 0, 1, 5, 6]), CLASSES)
    assert (found["top1"], found["top5"], found["n"]) == (3 / 6, 4 / 6, 6)
    assert found["mean_class"] == 1 / 4  # of a, b, f, g
    assert (found["class/0 a"], found["class/1 b"]) == (1, 0) and "class/2 c" not in found
    assert "3 of 7 classes have no example (the first: 'c')" in capsys.readouterr().err


def test_a_label_beyond_the_names_is_refused():
    with pytest.raises(UserError, match="2 names, but there is a label 2"):
        scores(np.eye(2, dtype=np.float32), _pooled(np.eye(2), [0, 2]), CLASSES[:2])


def _source(**about):
    return types.SimpleNamespace(**{"fields": ("image", "label"), "class_names": ()} | about)


def test_class_names_of_the_data_of_a_file_and_of_the_package(tmp_path):
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    assert names.class_names(_source(class_names=("a", "b"))) == ("a", "b")
    assert names.class_names(_source(), str(tmp_path / "names.txt")) == ("cat", "dog")
    shipped = names.class_names(_source(), "imagenet")
    assert (len(shipped), shipped[0], shipped[999]) == (1000, "tench", "toilet paper")
    assert len(names.templates((), "openai")) == 80
    assert names.templates(("a {}",)) == ("a {}",)


@pytest.mark.parametrize(
    "text, message",
    [
        ("cat\ndog\ncat\n", "1 names come twice, the first: 'cat'"),
        ("cat\n\ndog\n", "line 2 is empty"),
        ("", "the file is empty"),
        ("cat\ndog\nowl\n", "3 names, but the data have 2 classes"),
    ],
)
def test_a_bad_file_of_names_is_one_clear_line(tmp_path, text, message):
    (tmp_path / "names.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        names.class_names(_source(class_names=("a", "b")), str(tmp_path / "names.txt"))


def test_names_that_are_missing_are_told_of(tmp_path):
    with pytest.raises(UserError, match="have no labels"):
        names.class_names(_source(fields=("image",)))
    with pytest.raises(UserError, match="no class names: name them in a file"):
        names.class_names(_source())
    with pytest.raises(UserError, match="cannot be read"):
        names.class_names(_source(), str(tmp_path / "none.txt"))
    (tmp_path / "templates.txt").write_text("a {c}\nnothing\n")
    with pytest.raises(UserError, match="line 2 is 'nothing': write one {}"):
        names.templates((), str(tmp_path / "templates.txt"))


def test_evaluation_reads_as_the_configuration_says():
    config = default_config()
    config.data.workers, config.data.timeout_s, config.data.allow_truncated = 3, 7.0, True
    reading = reading_of(config.data)
    assert reading == Reading(workers=3, threads=2, timeout_s=7.0, allow_truncated=True)
    assert reading_of(default_config().data) == Reading()
