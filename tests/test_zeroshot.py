"""The zero-shot protocol, step by step."""

import types

import numpy as np
import pytest

from uta_jax import UserError
from uta_jax.config import default_config, reading_of
from uta_jax.data.loader import Reading
from uta_jax.evals import zeroshot
from uta_jax.evals.zeroshot import ZeroShot, accuracy, class_weights, prompts
from uta_jax.models.presets import CLIP


def _unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_prompts_keep_the_templates_of_a_class_together():
    assert prompts(["dog", "owl"], ["a {}", "{}!"]) == ["a dog", "dog!", "a owl", "owl!"]


def test_class_weights_normalise_average_normalise():
    features = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    expected = _unit(_unit(features).reshape(3, 2, 5).mean(1))
    np.testing.assert_allclose(class_weights(features, 2), expected, atol=1e-6)
    # The long feature of a class must not drown the short one.
    features[::2] *= 100
    np.testing.assert_allclose(class_weights(features, 2), expected, atol=1e-6)


def test_accuracy_counts_each_example_once_and_padding_never():
    weights = np.eye(7, dtype=np.float32)
    features = np.eye(7, dtype=np.float32)[[0, 1, 2, 3]] + 0.1 * np.arange(7, dtype=np.float32)
    label = np.array([0, 1, 3, 3])
    full = {"label": label, "valid": np.ones(4, bool)}
    padded = {"label": label, "valid": np.array([True, False, False, True])}
    scores = accuracy(weights, [(features, full), (features, padded)])
    # The first batch has 3 of 4 right, the second 2 of its 2 valid ones.
    assert scores == {"top1": pytest.approx(5 / 6), "top5": pytest.approx(1.0), "n": 6}


def test_top5_is_not_top1():
    weights = np.eye(7, dtype=np.float32)
    features = np.arange(7, 0, -1, dtype=np.float32)[None].repeat(7, axis=0)
    batch = {"label": np.arange(7), "valid": np.ones(7, bool)}
    scores = accuracy(weights, [(features, batch)])
    assert (scores["top1"], scores["top5"]) == (pytest.approx(1 / 7), pytest.approx(5 / 7))


def test_an_unlabelled_source_is_refused():
    class Unlabelled:
        class_names = ()

    with pytest.raises(UserError, match="class names"):
        ZeroShot(Unlabelled(), ("{}",), 8)


def test_evaluation_reads_as_the_configuration_says(monkeypatch):
    config = default_config()
    config.data.workers, config.data.timeout_s, config.data.allow_truncated = 3, 7.0, True
    reading = reading_of(config.data)
    assert reading == Reading(workers=3, threads=2, timeout_s=7.0, allow_truncated=True)
    assert reading_of(default_config().data) == Reading()
    asked = {}
    monkeypatch.setattr(zeroshot, "eval_batches", lambda source, **options: asked.update(options))
    source = types.SimpleNamespace(class_names=("a",))
    ZeroShot(source, ("{}",), 8, reading=reading).batches(CLIP["tiny_clip"])
    assert asked["reading"] == reading
