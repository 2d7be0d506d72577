"""Evaluators on small models and data: against scikit-learn, NumPy, and what users get wrong."""

import io
import types
from dataclasses import replace

import jax
import numpy as np
import pytest
from interop_models import CLIP_SPEC, random_params
from PIL import Image

from uta_jax import UserError, evals
from uta_jax.data.loader import Reading
from uta_jax.evals import alignment, dense, knn, linear_probe, retrieval, splits
from uta_jax.evals.features import Features, Pooled
from uta_jax.evals.setting import Setting
from uta_jax.mesh import make_mesh

# CLIP's tokenizer needs all of its words.
SPEC = replace(CLIP_SPEC, text=replace(CLIP_SPEC.text, vocab=49408))
NAMES = ("cat", "dog", "owl")


@pytest.fixture(scope="module")
def params():
    return {"vision": random_params(SPEC)["vision"], "text": random_params(SPEC)["text"]}


def png(array, mode=None):
    buffer = io.BytesIO()
    Image.fromarray(array, mode).save(buffer, "PNG")
    return buffer.getvalue()


class Examples:
    """A source of examples made by hand."""

    def __init__(self, examples, class_names=NAMES, name="a"):
        self._examples, self.class_names, self._name = examples, class_names, name
        self.fields = tuple(examples[0])
        self.reads = 0

    def __len__(self):
        return len(self._examples)

    def __getitem__(self, index):
        self.reads += 1
        return self._examples[index]

    def fingerprint(self):
        return self._name


def images(count, name="a", size=(24, 24), **fields):
    rng = np.random.default_rng(len(name) + count)
    made = [rng.integers(0, 256, (size[1], size[0], 3), np.uint8) for _ in range(count)]
    return Examples(
        [
            {"image": png(made[n]), "key": f"{name}{n}", "label": n % 3}
            | {field: of(n) for field, of in fields.items()}
            for n in range(count)
        ],
        name=name,
    )


def setting(teacher=None, folder=None, eval_keys=None, **sources):
    keys = dict(classnames="", templates=("a {}",), templates_file="")
    keys |= dict(window_side=0, window_stride=0) | (eval_keys or {})
    features = Features(8, make_mesh(), Reading(), folder)
    return Setting(types.SimpleNamespace(**keys), SPEC, teacher, sources.get, features)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


# Features


def test_each_example_once_and_kept_on_the_disk(params, tmp_path):
    """11 examples in batches of 8, one of them no image."""
    source = images(11)
    source._examples[4]["image"] = b"no image"
    found = setting(folder=tmp_path).features.pooled(params["vision"], SPEC, source)
    assert found.index_n.tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 9, 10]
    assert found.label_n.tolist() == [0, 1, 2, 0, 2, 0, 1, 2, 0, 1]
    reads = source.reads
    again = setting(folder=tmp_path).features.pooled(params["vision"], SPEC, source)
    assert source.reads == reads and len(list(tmp_path.iterdir())) == 1
    jax.tree.map(np.testing.assert_array_equal, again, found)
    # Half a file counts for nothing, and other weights are other features.
    next(tmp_path.iterdir()).write_bytes(b"PK\3\4 half a file")
    broken = setting(folder=tmp_path).features.pooled(params["vision"], SPEC, source)
    jax.tree.map(np.testing.assert_array_equal, broken, found)
    other = random_params(SPEC, seed=1)["vision"]
    assert (setting(folder=tmp_path).features.pooled(other, SPEC, source)[0] != found[0]).any()


def test_features_that_are_not_finite_are_refused(params):
    broken = params["vision"] | {"cls_token": np.full(32, np.nan, np.float32)}
    with pytest.raises(UserError, match=r"features of 11 of 11 examples are not finite.*\(.*a0\)"):
        setting().features.pooled(broken, SPEC, images(11))


# kNN and the linear probe


@pytest.fixture(scope="module")
def clouds():
    """Points around 10 centres, 600 to learn from and 1,000 to test on."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(10, 16))

    def draw(count):
        label_n = np.arange(count, dtype=np.int32) % 10
        feature = (centres[label_n] + 1.5 * rng.normal(size=(count, 16))).astype(np.float32)
        return Pooled(feature, np.arange(count), label_n)

    return draw(600), draw(1000)


def test_knn_agrees_with_scikit_learn(clouds):
    from sklearn.neighbors import KNeighborsClassifier

    fit, test = clouds
    ours = knn.accuracy(fit, test, 10)
    assert tuple(ours) == knn.KS

    def weights(distance):
        return np.exp((1 - distance) / knn.TEMPERATURE)

    for k, share in ours.items():
        theirs = KNeighborsClassifier(k, weights=weights, algorithm="brute", metric="cosine")
        theirs.fit(unit(fit.feature_ne), fit.label_n)
        expected = theirs.score(unit(test.feature_ne), test.label_n)
        assert 0.3 < share < 0.95 and abs(share - expected) <= 0.002
    few = Pooled(fit.feature_ne[:15], fit.index_n[:15], fit.label_n[:15])
    assert tuple(knn.accuracy(few, test, 10)) == (10,)


def test_the_linear_probe_agrees_with_scikit_learn(clouds):
    from sklearn.linear_model import LogisticRegression

    fit, test = clouds
    x_fit = linear_probe.standardised(fit.feature_ne, fit.feature_ne)
    x_test = linear_probe.standardised(test.feature_ne, fit.feature_ne)

    def theirs(c, rows):
        model = LogisticRegression(C=c, max_iter=5000, tol=1e-5)
        return model.fit(x_fit[rows], fit.label_n[rows])

    mesh = make_mesh()
    heads = linear_probe.fitted(x_fit, fit.label_n, linear_probe.STRENGTHS, 10, mesh)
    shares = linear_probe.accuracy(heads, x_test, test.label_n)
    for c, share in zip(linear_probe.STRENGTHS, shares, strict=True):
        assert abs(share - theirs(c, slice(None)).score(x_test, test.label_n)) <= 0.002
    assert max(shares) - min(shares) > 0.01  # the sweep matters
    held = np.arange(600) % 5 == 4
    on_held = [
        theirs(c, ~held).score(x_fit[held], fit.label_n[held]) for c in linear_probe.STRENGTHS
    ]
    best = linear_probe.STRENGTHS[int(np.argmax(on_held))]
    expected = theirs(best, slice(None)).score(x_test, test.label_n)
    found = linear_probe.probe(fit, test, 10, mesh)
    assert found["C"] == best and abs(found["top1"] - expected) <= 0.002


def test_what_cannot_be_learnt_from_is_named(params):
    def pair(fit, test):
        return splits.labelled_pair(params["vision"], setting(fit=fit, test=test))

    same = images(4)
    with pytest.raises(UserError, match="config.eval.fit: these are the very images"):
        pair(same, same)
    with pytest.raises(UserError, match="config.eval.fit: 1 of 3 classes have no example.*'owl'"):
        pair(images(2, "b"), same)  # more classes than examples
    other = images(6, "c")
    other.class_names = ("cat", "dog", "fox")
    with pytest.raises(UserError, match="its 3 classes are not the 3 of config.eval"):
        pair(other, same)
    other.fields = ("image", "key")
    with pytest.raises(UserError, match="config.eval.fit: the examples have no labels"):
        pair(other, same)


# Retrieval


def test_recall_of_several_captions_an_image():
    rng = np.random.default_rng(0)
    image_ne = rng.normal(size=(30, 8)).astype(np.float32)
    owner_m = np.repeat(np.arange(30), np.arange(30) % 3 + 1)
    text_me = image_ne[owner_m] + 1.2 * rng.normal(size=(len(owner_m), 8)).astype(np.float32)
    found = retrieval.recalls(image_ne, text_me, owner_m)
    cosine = unit(image_ne) @ unit(text_me).T
    right = owner_m[None] == np.arange(30)[:, None]
    for k in retrieval.KS:
        to_text = np.take_along_axis(right, np.argsort(-cosine, axis=1)[:, :k], axis=1)
        to_image = np.take_along_axis(right.T, np.argsort(-cosine.T, axis=1)[:, :k], axis=1)
        assert found[f"image_to_text/{k}"] == pytest.approx(to_text.any(axis=1).mean())
        assert found[f"text_to_image/{k}"] == pytest.approx(to_image.any(axis=1).mean())
    assert (found["n_images"], found["n_texts"]) == (30, len(owner_m))


def test_missing_captions_are_counted_and_named(params):
    source = images(5, text=lambda n: "a cat\na dog" if n % 2 else " ")
    with pytest.raises(UserError, match=r"3 of 5 examples have no caption \(the first: a0\)"):
        retrieval.captions(source, np.arange(5))
    with pytest.raises(UserError, match="config.eval.captions: the examples have no captions"):
        retrieval.run(params, {}, setting(captions=images(5)))


# Dense


def masks(size):
    def of(n):
        mask = np.random.default_rng(n).integers(0, 4, (size[1], size[0])).astype(np.uint8)
        return png(mask)

    return of


def brute_force(params, source, side, window=24, patch=8, stride=8):
    """The protocol of dense.py, pixel by pixel: (mIoU, share of pixels)."""
    cfg = setting()
    weights_ce = np.asarray(evals.zeroshot.classifier(params["text"], cfg, NAMES))
    inter, union, right, total = np.zeros(3), np.zeros(3), 0, 0
    for n in range(len(source)):
        picture = Image.open(io.BytesIO(source[n]["image"]))
        mask = np.asarray(Image.open(io.BytesIO(source[n]["mask"])))
        scale = side / min(picture.size) / patch
        w, h = (max(side, round(length * scale) * patch) for length in picture.size)
        pixels = np.asarray(picture.resize((w, h), Image.Resampling.BICUBIC))
        cells = [[[] for _ in range(w // patch)] for _ in range(h // patch)]
        for top in range(0, h - window + 1, stride):
            for left in range(0, w - window + 1, stride):
                cut = pixels[None, top : top + window, left : left + window]
                tokens = evals.features.encode_images(params["vision"], cut, spec=SPEC, tokens=True)
                cosine = unit(np.asarray(tokens)[0, 1:]) @ weights_ce.T
                for i in range(9):
                    cells[top // patch + i // 3][left // patch + i % 3].append(cosine[i])
        mean = np.array([[np.mean(cell, axis=0) for cell in row] for row in cells])
        for y in range(mask.shape[0]):
            for x in range(mask.shape[1]):
                if not mask[y, x]:
                    continue
                i = min(max((y + 0.5) * mean.shape[0] / mask.shape[0] - 0.5, 0), len(mean) - 1)
                j = min(max((x + 0.5) * mean.shape[1] / mask.shape[1] - 0.5, 0), len(mean[0]) - 1)
                i0, j0 = int(i), int(j)
                i1, j1 = min(i0 + 1, len(mean) - 1), min(j0 + 1, len(mean[0]) - 1)
                above = mean[i0, j0] * (j0 + 1 - j) + mean[i0, j1] * (j - j0)
                below = mean[i1, j0] * (j0 + 1 - j) + mean[i1, j1] * (j - j0)
                predicted = np.argmax(above * (i0 + 1 - i) + below * (i - i0))
                label, total = mask[y, x] - 1, total + 1
                right += predicted == label
                for c in range(3):
                    inter[c] += predicted == c == label
                    union[c] += predicted == c or label == c
    return np.mean(inter / union), right / total


def test_miou_is_that_of_brute_force(params):
    """Images of another shape than the window: two scales, overlapping windows, ragged batches."""
    for size, side in (((24, 24), 24), ((43, 30), 32)):
        source = images(3, size=size, mask=masks(size))
        keys = {"window_side": side, "window_stride": 8}
        found = dense.run(params, {}, setting(masks=source, eval_keys=keys))
        miou, share = brute_force(params, source, side)
        assert found["n"] == 3 and 0.05 < found["miou"] < 0.9
        assert found["miou"] == pytest.approx(miou, abs=1e-12)
        assert found["pixel_accuracy"] == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize(
    "size, values, message",
    [
        ((20, 24), 2, "a0: a mask of 20x24 for an image of 24x24"),
        ((24, 24), 4, "a mask holds 4, but there are 3 classes"),
        ((24, 24), 0, "every mask is all background"),
    ],
)
def test_masks_that_do_not_fit_are_named(params, size, values, message):
    mask = png(np.full(size[::-1], values, np.uint8))
    with pytest.raises(UserError, match=f"config.eval.masks: {message}"):
        dense.run(params, {}, setting(masks=images(2, mask=lambda n: mask)))


@pytest.mark.parametrize(
    "keys, message",
    [
        (
            {"window_side": 16},
            "window_side=16: must be a multiple of the patch size 8, at least 24",
        ),
        ({"window_stride": 12}, "window_stride=12: must be a multiple of the patch size 8"),
        ({"window_stride": 32}, "window_stride=32: leaves gaps; at most 24"),
    ],
)
def test_windows_that_do_not_fit_are_named(params, keys, message):
    with pytest.raises(UserError, match=message):
        dense.run(params, {}, setting(masks=images(2, mask=masks((24, 24))), eval_keys=keys))


# Alignment


def test_alignment_is_that_of_numpy(params):
    source, teacher = images(11), random_params(SPEC, seed=1)
    found = alignment.run(params, teacher, setting(teacher=SPEC, test=source))
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(e["image"]))) for e in source._examples])
    x, y = (
        unit(np.float64(evals.features.encode_images(p["vision"], pixels, spec=SPEC, tokens=True)))
        for p in (params, teacher)
    )
    cosine = (x * y).sum(axis=2).mean(axis=0)
    assert found["cos_cls"] == pytest.approx(cosine[0], abs=1e-6)
    assert found["cos_patch"] == pytest.approx(cosine[1:].mean(), abs=1e-6)
    assert found["position/1,2"] == pytest.approx(cosine[1 + 5], abs=1e-6)

    def cka(a, b):
        a, b = (z.reshape(-1, z.shape[-1]) for z in (a, b))
        a, b = a - a.mean(axis=0, keepdims=True), b - b.mean(axis=0, keepdims=True)
        below = np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b)
        return np.linalg.norm(b.T @ a) ** 2 / below

    assert found["cka_cls"] == pytest.approx(cka(x[:, :1], y[:, :1]), abs=1e-5)
    assert found["cka_patch"] == pytest.approx(cka(x[:, 1:], y[:, 1:]), abs=1e-5)
    assert found["n"] == 11
    own = alignment.run(params, params, setting(teacher=SPEC, test=source))
    shown = [own[name] for name in alignment.HEADLINE]
    assert shown == pytest.approx([1, 1, 1, 1], abs=1e-5)


# The table


def test_unknown_evaluators_and_figures_that_are_no_numbers_are_refused(monkeypatch):
    with pytest.raises(UserError, match="--eval=fid: must be one of zeroshot, retrieval, knn"):
        evals.check_names(["knn", "fid"], "--eval")
    broken = replace(evals.EVALUATORS["knn"], run=lambda *_: {"top1/10": float("nan")})
    monkeypatch.setitem(evals.EVALUATORS, "knn", broken)
    with pytest.raises(UserError, match="eval knn: top1/10 came out as nan"):
        evals.measure(["knn"], {}, {}, None)


def test_alignment_needs_a_teacher(params):
    with pytest.raises(UserError, match="this run has no teacher"):
        alignment.run(params, {}, setting(test=images(3)))
