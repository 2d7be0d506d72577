"""Zero-shot and retrieval against clip_benchmark and open_clip, on an exported model.

One data set in webdataset layout, drawn here, is read by their loader and by ours; the model is the
little CLIP of the package, exported to transformers and run in PyTorch.
"""

import io
import tarfile
import types

import jax
import numpy as np
import pytest

from uta_jax.data import emoji_scenes
from uta_jax.data.loader import Reading
from uta_jax.data.sources import TarSource
from uta_jax.data.tokenizer import Tokenizer
from uta_jax.evals import retrieval, zeroshot
from uta_jax.evals.features import Features
from uta_jax.evals.setting import Setting
from uta_jax.interop.export import export
from uta_jax.interop.teacher import load_clip
from uta_jax.mesh import make_mesh

torch = pytest.importorskip("torch")
open_clip = pytest.importorskip("open_clip")
transformers = pytest.importorskip("transformers")
pytest.importorskip("clip_benchmark")
pytest.importorskip("webdataset")
# webdataset leaves its shards open, and clip_benchmark its shuffling to it (one shard: none).
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:WebDataset.shardshuffle=:UserWarning"),
]

EXAMPLES, SIZE, BATCH = 100, 64, 32  # the last batch is not full
CLASSES = emoji_scenes.class_names[:32]
TEMPLATES = ("{}", "a {}")


@pytest.fixture(scope="module")
def clip():
    return load_clip("asset:tiny_clip")


class Theirs(torch.nn.Module):
    """What clip_benchmark and open_clip call, by transformers."""

    def __init__(self, path):
        super().__init__()
        self.model = transformers.CLIPModel.from_pretrained(path).eval()

    def encode_image(self, image):
        return self.model.get_image_features(pixel_values=image).pooler_output

    def encode_text(self, ids, normalize=False):
        found = self.model.get_text_features(input_ids=ids).pooler_output
        return torch.nn.functional.normalize(found, dim=-1) if normalize else found


@pytest.fixture(scope="module")
def theirs(clip, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "hf"
    export(clip.params, clip.spec, "hf", out, {})
    return Theirs(out)


def tokenize(texts):
    return torch.from_numpy(Tokenizer(32)(texts).astype(np.int64))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A data set as clip_benchmark describes it: test/0.tar, classnames.txt, templates."""
    root = tmp_path_factory.mktemp("wds")
    (root / "test").mkdir()
    with tarfile.open(root / "test" / "0.tar", "w") as tar:
        for n in range(EXAMPLES):
            index = n // len(CLASSES) * len(emoji_scenes.class_names) + n % len(CLASSES)
            scene = emoji_scenes.example(0, "val_single", index, SIZE)
            # All different: which of two equal captions is nearer is nobody's to say.
            starts = ("", "a drawing of ", "an image with ")[: 1 + n % 3]
            captions = [f"{start}{scene['text']}, number {n}" for start in starts]
            values = {"png": scene["image"], "cls": str(scene["label"]).encode()}
            values["txt"] = "\n".join(captions).encode()
            for suffix, data in values.items():
                info = tarfile.TarInfo(f"{n:04d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    (root / "test" / "nshards.txt").write_text("1")
    (root / "classnames.txt").write_text("\n".join(CLASSES) + "\n")
    lines = (template.replace("{}", "{c}") for template in TEMPLATES)
    (root / "zeroshot_classification_templates.txt").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="module")
def cfg(clip, shards):
    source = TarSource(shards, "test", progress=False)
    keys = types.SimpleNamespace(
        classnames="",
        templates=(),
        templates_file=str(shards / "zeroshot_classification_templates.txt"),
    )
    features = Features(BATCH, make_mesh(1, 1, devices=jax.devices()[:1]), Reading())
    return Setting(keys, clip.spec, None, lambda role: source, features)


def their_data(shards, kind):
    from clip_benchmark.datasets.builder import build_wds_dataset, image_captions_collate_fn

    spec = load_clip("asset:tiny_clip").spec
    (shards / "dataset_type.txt").write_text(kind)
    transform = open_clip.image_transform(SIZE, is_train=False, mean=spec.mean, std=spec.std)
    data = build_wds_dataset("ours", transform, "test", str(shards))
    collate = image_captions_collate_fn if kind == "retrieval" else None
    return data, torch.utils.data.DataLoader(data, batch_size=BATCH, collate_fn=collate)


def test_zeroshot_is_that_of_clip_benchmark(clip, theirs, shards, cfg):
    from clip_benchmark.metrics import zeroshot_classification
    from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

    data, loader = their_data(shards, "classification")
    assert data.templates == ["{c}", "a {c}"] and tuple(data.classes) == CLASSES
    weights = zeroshot_classification.zero_shot_classifier(
        theirs, tokenize, data.classes, data.templates, "cpu", amp=False
    )
    logits, label = zeroshot_classification.run_classification(
        theirs, weights, loader, "cpu", amp=False
    )
    # Its own `accuracy` fails with the NumPy that is installed; scikit-learn counts instead.
    expected = {
        "top1": top_k_accuracy_score(label, logits, k=1, labels=range(len(CLASSES))),
        "top5": top_k_accuracy_score(label, logits, k=5, labels=range(len(CLASSES))),
        "mean_class": balanced_accuracy_score(label, logits.argmax(axis=1)),
        "n": EXAMPLES,
    }
    ours = zeroshot.run(clip.params, {}, cfg)
    assert 0.1 < ours["top1"] < ours["top5"] <= 1
    assert {name: ours[name] for name in expected} == pytest.approx(expected, abs=1e-9)


def test_class_weights_are_those_of_open_clip(clip, theirs, cfg):
    expected = open_clip.build_zero_shot_classifier(theirs, tokenize, CLASSES, TEMPLATES)
    ours = zeroshot.classifier(clip.params["text"], cfg, CLASSES)
    np.testing.assert_allclose(ours, expected.numpy().T, atol=1e-6)


def test_retrieval_is_that_of_clip_benchmark(clip, theirs, shards, cfg):
    from clip_benchmark.metrics import zeroshot_retrieval

    _, loader = their_data(shards, "retrieval")
    expected = zeroshot_retrieval.evaluate(
        theirs, loader, tokenize, "cpu", amp=False, recall_k_list=[1, 5, 10]
    )
    ours = retrieval.run(clip.params, {}, cfg)
    assert ours["n_images"] == EXAMPLES < ours["n_texts"]
    assert 0.05 < ours["text_to_image/1"] < ours["text_to_image/10"] < 1
    for k in retrieval.KS:
        found = ours[f"image_to_text/{k}"], ours[f"text_to_image/{k}"]
        names = (f"text_retrieval_recall@{k}", f"image_retrieval_recall@{k}")
        assert found == pytest.approx([expected[name] for name in names], abs=1e-6)


def test_names_and_templates_of_imagenet_are_those_of_open_clip():
    from uta_jax.evals import names

    unnamed = types.SimpleNamespace(fields=("label",), class_names=())
    assert names.class_names(unnamed, "imagenet") == tuple(open_clip.IMAGENET_CLASSNAMES)
    expected = [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    assert names.templates((), "openai") == tuple(expected)
