"""Exports: read back bit for bit, run by the library they are for, and honest about both."""

import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from uta_jax import UserError
from uta_jax.__main__ import main
from uta_jax.data.tokenizer import Tokenizer, open_tokenizer
from uta_jax.data.transforms import eval_transform
from uta_jax.embed import embed
from uta_jax.interop import export as exporting
from uta_jax.interop import libraries, translate
from uta_jax.interop.export import EXPORTS, LIMITS, export, fitting_formats
from uta_jax.interop.files import WRITTEN
from uta_jax.interop.teacher import load_clip
from uta_jax.models.encode import encode_images, encode_texts
from uta_jax.models.presets import CLIP, VIT, ClipSpec, TextSpec, VitSpec

TEXT = TextSpec(8, 60, 64, 2, 1, 96, 40, act="quick_gelu")
HF_CLIP = ClipSpec(
    VitSpec(24, 8, 64, 2, 4, 96, 40, act="gelu", ln_eps=1e-5, embed_norm=True, patch_bias=False),
    TEXT, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3),
)  # fmt: skip
OPEN_CLIP = replace(
    HF_CLIP, vision=replace(HF_CLIP.vision, act="quick_gelu"), interpolation="bilinear"
)
SIGLIP = ClipSpec(
    VitSpec(
        24, 8, 64, 2, 4, 128, 64, act="gelu_tanh", cls=False, pool="map", head_proj=False,
    ),
    TextSpec(
        8, 60, 64, 2, 4, 128, 64, act="gelu_tanh", ln_eps=1e-6, causal=False, pool="last",
        head_bias=True,
    ),
    mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), resize="squash", logit_bias=True,
)  # fmt: skip
DINOV2 = ClipSpec(
    VitSpec(28, 14, 64, 2, 4, 256, 64, layer_scale=True, head_proj=False), None, resize_size=32
)
UTA_VIT = VitSpec(
    24, 8, 64, 2, 4, 128, 40,
    act="swiglu", qkv_bias="qv", mlp_norm=True, head_bias=True, rope_theta=10000.0,
)  # fmt: skip
UTA = ClipSpec(UTA_VIT, replace(TEXT, act="gelu"))
UTA_OPENAI = ClipSpec(UTA_VIT, TEXT)  # a teacher whose text tower is QuickGELU

CASES = {
    "hf_clip": ("hf", HF_CLIP),
    "hf_siglip": ("hf", SIGLIP),
    "hf_dinov2": ("hf", DINOV2),
    "open_clip": ("open_clip", OPEN_CLIP),
    "open_clip_uta": ("open_clip", UTA_OPENAI),
    "timm_vit": ("timm", HF_CLIP),
    "timm_dinov2": ("timm", replace(DINOV2, resize_size=0)),
    "timm_uta": ("timm", UTA_OPENAI),
    "uta": ("uta", UTA),
}


def random_params(spec, seed=0):
    """Norms, biases and scales away from their defaults; activations of ordinary size."""
    rng = np.random.default_rng(seed)
    flat = {}
    for path, shape in translate.param_shapes(spec).items():
        x = rng.normal(size=shape)
        kernel = path.endswith(("kernel", "embedding", "probe", "token", "pos_embed"))
        scale = path.endswith("scale") or "layer_scale" in path
        x = x * 0.1 if kernel else 1 + 0.2 * x if scale else 0.2 * x
        flat[path] = np.asarray(x, np.float32)
    return translate.unflatten(flat)


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def test_the_library_gives_our_features_and_every_tensor_comes_back(case, tmp_path):
    """Bit for bit: what is read as a checkpoint is written as the same tensors again."""
    fmt, spec = case
    done = export(random_params(spec), spec, fmt, tmp_path / "a", {"steps": 7})
    assert done.reread == 0 and done.layout in EXPORTS[fmt].layouts
    if fmt == "uta":
        assert done.difference is None and done.by.endswith("is no installable package")
    else:
        assert done.difference <= 5e-5
    assert {p.name for p in (tmp_path / "a").iterdir()} <= WRITTEN
    again = load_clip(tmp_path / "a")
    theirs = translate.to_theirs(done.layout, again.spec, again.params)
    stored = load_file(tmp_path / "a" / EXPORTS[fmt].weights)
    assert theirs.keys() == stored.keys()
    assert all(np.array_equal(theirs[name], stored[name]) for name in stored)


def code_of(folder):
    """The lines of the model card that load the model."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    return code


@pytest.mark.parametrize("name", ["hf_siglip", "open_clip_uta", "timm_uta"])
def test_the_lines_on_the_card_load_the_model(name, tmp_path):
    """With the library alone, where the directory lies in the end; and they give our features."""
    fmt, spec = CASES[name]
    params = random_params(spec)
    export(params, spec, fmt, tmp_path / "model", {})
    found = {"DIRECTORY": str(tmp_path / "model")}
    exec(code_of(tmp_path / "model"), found)
    image = np.random.default_rng(3).normal(size=(3, 24, 24, 3)).astype(np.float32)
    model = found["model"].eval()
    encode = {
        "hf": lambda x: model.get_image_features(pixel_values=x).pooler_output,
        "open_clip": lambda x: model.encode_image(x),
        "timm": model,
    }[fmt]
    theirs = libraries.run(encode, image.transpose(0, 3, 1, 2))
    ours = np.asarray(encode_images(params["vision"], image, spec=spec))
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (ours, theirs)]
    np.testing.assert_allclose(*unit, rtol=0, atol=5e-5)


def save_tokenizer(folder, ends=True):
    import tokenizers

    words = [
        "<unk>",
        "</s>",
        "▁a",
        "▁cat",
        "▁dog",
        "▁A",
        "▁cat.",
        "▁Two",
        "▁two",
        "▁dogs",
        "▁dogs,",
    ]
    vocabulary = {word: i for i, word in enumerate(words)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    if ends:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            "$A </s>", special_tokens=[("</s>", 1)]
        )
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.mark.parametrize("fmt", ["hf", "open_clip"])
def test_texts_are_cleaned_as_they_were(fmt, tmp_path):
    """Each way of cleaning survives both formats, and the library's tokens are compared."""
    text = replace(SIGLIP.text, vocab=32000)
    spec = replace(SIGLIP, text=text, tokenizer="tokenizer.json")
    params, seen = random_params(spec), set()
    for cleaning in ("open_clip", "lower"):
        spec = replace(spec, cleaning=cleaning)
        file = save_tokenizer(tmp_path)
        export(params, spec, fmt, tmp_path / cleaning, {}, tokenizer_file=file)
        assert load_clip(tmp_path / cleaning).spec == spec
        assert (
            "| texts in the library | the same" in (tmp_path / cleaning / "README.md").read_text()
        )
        seen.add(open_tokenizer("tokenizer.json", tmp_path, 8, cleaning)(["A cat."]).tobytes())
    assert len(seen) == 2
    file = save_tokenizer(tmp_path, ends=False)
    with pytest.raises(UserError, match="reads texts as other tokens than ours"):
        export(params, spec, fmt, tmp_path / "x", {}, tokenizer_file=file)
    assert not (tmp_path / "x").exists()


def test_a_tokenizer_lies_beside_the_weights(tmp_path):
    """And transformers reads it as we do."""
    from transformers import AutoTokenizer

    save_tokenizer(tmp_path)
    spec = replace(SIGLIP, tokenizer="tokenizer.json")
    export(
        random_params(spec), spec, "hf", tmp_path / "x", {},
        tokenizer_file=tmp_path / "tokenizer.json",
    )  # fmt: skip
    again = load_clip(tmp_path / "x")
    assert again.spec == spec
    ours = open_tokenizer("tokenizer.json", again.tokenizer_file.parent, 8)(["a dog", "", "a a"])
    theirs = AutoTokenizer.from_pretrained(tmp_path / "x")(
        ["a dog", "", "a a"], padding="max_length", truncation=True
    )
    assert ours.tolist() == theirs["input_ids"] and ours[0].tolist()[:3] == [2, 4, 1]
    texts = tmp_path / "texts.txt"
    texts.write_text("a dog\na a\n")
    embed(tmp_path / "x", tmp_path / "o.npz", texts=texts)
    with np.load(tmp_path / "o.npz") as found:
        want = encode_texts(again.params["text"], ours[[0, 2]], spec=spec.text)
        np.testing.assert_allclose(found["text_features"], want, rtol=0, atol=1e-5)


def test_open_clip_prepares_images_and_texts_as_we_do(tmp_path):
    import open_clip

    spec = replace(OPEN_CLIP, text=replace(TEXT, vocab=49408, context=11))
    export(random_params(spec), spec, "open_clip", tmp_path / "m", {})
    name = f"local-dir:{tmp_path / 'm'}"
    _, preprocess = open_clip.create_model_from_pretrained(name)
    texts = ["a photo of a cat", "", "a long text " * 9]
    np.testing.assert_array_equal(open_clip.get_tokenizer(name)(texts), Tokenizer(11)(texts))
    pixels = np.random.default_rng(0).integers(0, 256, (50, 37, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    ours = eval_transform(buffer.getvalue(), 24, interpolation="bilinear") / np.float32(255)
    ours = (ours - np.float32(spec.mean)) / np.float32(spec.std)
    theirs = preprocess(Image.fromarray(pixels)).numpy().transpose(1, 2, 0)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


def test_a_tower_that_needs_arguments_says_where_it_lies(tmp_path):
    params = random_params(UTA_OPENAI)
    export(params, UTA_OPENAI, "open_clip", tmp_path / "here", {})
    export(params, UTA_OPENAI, "open_clip", tmp_path / "hub", {}, home="hf-hub:me/mine")
    for folder, home in {"here": f"local-dir:{tmp_path / 'here'}", "hub": "hf-hub:me/mine"}.items():
        config = json.loads((tmp_path / folder / "open_clip_config.json").read_text())
        assert config["model_cfg"]["vision_cfg"]["timm_model_name"] == home
        assert f"| must lie at | {home}," in (tmp_path / folder / "README.md").read_text()
    with pytest.raises(UserError, match="home='me/mine' must be local-dir:PATH or hf-hub:ORG/NAME"):
        export(params, UTA_OPENAI, "open_clip", tmp_path / "x", {}, home="me/mine")


def test_full_size_models_fit_where_they_should():
    def fits(vision, text):
        return fitting_formats(ClipSpec(VIT[vision], text and CLIP[text].text))

    assert fits("clip_b16", "clip_b16") == ["hf", "open_clip", "timm"]
    assert fits("uta_b16", "clip_b16") == ["open_clip", "timm"]
    assert fits("uta_g14_336", "eva01_g14_plus") == ["open_clip", "timm", "uta"]
    assert fits("eva02_l14_336", "eva02_l14_336") == ["open_clip", "timm"]
    assert fits("dinov2_b14", None) == ["hf", "timm"]
    assert fits("dinov2_b14", "clip_b16") == ["timm"]
    assert fitting_formats(CLIP["siglip_b16"]) == ["hf", "open_clip", "timm"]


def test_a_misfit_names_the_formats_that_fit(tmp_path):
    for fmt, spec, message in (
        ("hf", UTA, r"'hf' cannot hold .* vision.act = 'swiglu' .* and \d+ more; "
         "formats that can: open_clip, timm, uta$"),
        ("uta", UTA_OPENAI, "text.act = 'quick_gelu' .*; formats that can: open_clip, timm$"),
        ("open_clip", DINOV2, "formats that can: hf, timm$"),
        ("open_clip", HF_CLIP, "QuickGELU .both or neither|both or neither.*can: hf, timm$"),
        ("onnx", UTA, "format='onnx' must be one of: hf, open_clip, timm, uta"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message) as error:
            export({}, spec, fmt, tmp_path / "x", {})
        assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


# The checks


def test_a_library_that_computes_something_else_leaves_nothing(tmp_path, monkeypatch):
    """Another activation behind the back of what was checked until then, say."""

    def tampering(work, params, spec):
        config = (work / "config.json").read_text()
        (work / "config.json").write_text(config.replace('"gelu"', '"quick_gelu"'))
        return 0.0

    monkeypatch.setattr(exporting, "_reread", tampering)
    with pytest.raises(UserError, match=r"transformers 5.* other features .*allowed 5e-05"):
        export(random_params(HF_CLIP), HF_CLIP, "hf", tmp_path / "x", {})
    monkeypatch.setattr(libraries, "run", lambda encode, x: np.full((3, 40), np.nan))
    with pytest.raises(UserError, match="difference nan"):
        export(random_params(HF_CLIP), HF_CLIP, "hf", tmp_path / "x", {})
    assert not list(tmp_path.iterdir())


def test_without_the_library_the_card_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(libraries.util, "find_spec", lambda name: None)
    done = export(random_params(HF_CLIP), HF_CLIP, "hf", tmp_path / "x", {})
    assert done.difference is None and done.reread == 0
    assert str(done) == "not run in its library: torch, transformers not installed"
    assert f"| features in the library | {done} |" in (tmp_path / "x" / "README.md").read_text()


def test_half_precision_is_checked_against_the_model_before_rounding(tmp_path):
    done = export(random_params(HF_CLIP), HF_CLIP, "hf", tmp_path / "x", {}, dtype="float16")
    assert LIMITS["float32"] < done.difference <= done.limit == LIMITS["float16"]
    weights = load_file(tmp_path / "x" / "model.safetensors")
    assert {x.dtype for x in weights.values()} == {np.dtype(np.float16)}
    assert "allowed 0.005" in (tmp_path / "x" / "README.md").read_text()


def test_nan_is_not_exported(tmp_path):
    params = random_params(HF_CLIP)
    params["vision"]["cls_token"][0] = np.nan
    with pytest.raises(UserError, match="NaN or infinity in vision/cls_token"):
        export(params, HF_CLIP, "hf", tmp_path / "x", {})
    assert not list(tmp_path.iterdir())


def test_a_bad_disk_is_noticed(tmp_path, monkeypatch):
    """A write that loses one bit is no export."""

    def careless(tensors, path, **kwargs):
        tensors["visual_projection.weight"] = np.nextafter(tensors["visual_projection.weight"], 9)
        save_file(tensors, path, **kwargs)

    monkeypatch.setattr("uta_jax.interop.files.save_file", careless)
    with pytest.raises(UserError, match="what was written reads differently"):
        export(random_params(HF_CLIP), HF_CLIP, "hf", tmp_path / "x", {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["hf_clip", "open_clip_uta", "timm_vit", "uta"])
def test_an_earlier_export_is_replaced_only_when_asked(name, tmp_path):
    fmt, spec = CASES[name]
    export(random_params(spec), spec, fmt, tmp_path / "x", {})
    before, params = contents(tmp_path / "x"), random_params(spec, seed=1)
    with pytest.raises(UserError, match="already exists"):
        export(params, spec, fmt, tmp_path / "x", {})
    assert contents(tmp_path / "x") == before
    export(params, spec, fmt, tmp_path / "x", {}, overwrite=True)
    assert contents(tmp_path / "x").keys() == before.keys() and contents(tmp_path / "x") != before


def test_model_card(tmp_path):
    card = {"teacher": "asset:tiny_clip", "steps": 600, "licence": "apache-2.0", "data": "a|b\n# c"}
    export(random_params(HF_CLIP), HF_CLIP, "hf", tmp_path / "student", card)
    text = (tmp_path / "student" / "README.md").read_text()
    assert text.startswith('---\nlicense: "apache-2.0"\n') and "# student" in text
    for word in ("asset:tiny_clip", "| steps | 600 |", "24 px", "CLIPModel.from_pretrained",
                 "trained by uta-jax", "openai/clip-vit-base-patch32",
                 "| crop | transformers", "difference after writing | 0 |",
                 "a\\|b # c"):  # fmt: skip
        assert word in text
    assert re.search(r"transformers 5\S* agrees within \d\.\de-0\d \(allowed 5e-05\)", text)


# The command


def test_the_command_takes_any_model(tmp_path, teacher_dir, capsys):
    argv = ["export", f"--model={teacher_dir}", "--format=timm", f"--out={tmp_path / 'x'}"]
    assert main([*argv, "--licence=mit"]) == 0
    line = capsys.readouterr().out
    assert re.fullmatch(
        rf"{tmp_path}/x: timm, float32, re-read and equal; timm 1\S* agrees within .*\)\n", line
    )
    text = (tmp_path / "x" / "README.md").read_text()
    for word in ("A vision tower, converted by uta-jax", "source sha256", 'license: "mit"'):
        assert word in text
    assert main(argv) == 2
    assert "already exists" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["--workdir=a", "--model=b"]])
def test_the_command_wants_one_model(argv, tmp_path, capsys):
    assert main(["export", f"--out={tmp_path / 'x'}", *argv]) == 2
    assert "give either --workdir (a run) or --model" in capsys.readouterr().err
