"""Tokenizer files of SigLIP models: ours against transformers' and open_clip's own classes.

The vocabularies are trained here, in the layouts of the published ones: SigLIP's is a sentencepiece
unigram model (also as T5's ``tokenizer.json``), SigLIP 2's is Gemma's byte pairs.
"""

import io
import itertools
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_tokenizer import STRINGS

from uta_jax import UserError
from uta_jax.data.tokenizer import FileTokenizer, Tokenizer, open_tokenizer
from uta_jax.interop.files import read_json, write_json
from uta_jax.interop.hf_config import hf_configs
from uta_jax.interop.hf_processor import cleaning, tokenizer_config
from uta_jax.interop.open_clip_config import model_spec, open_clip_configs
from uta_jax.models.presets import CLIP

sentencepiece = pytest.importorskip("sentencepiece")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

CONTEXT = 24
GEMMA = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
CORPUS = [
    "a photo of a dog", "the quick brown fox jumps over the lazy dog", "two cats on a red sofa",
    "it's a \"quoted\" text: 1234 12.5% of $5 & more", "日本語 テキスト 你好 世界",
    "family of emoji 🍎 🍎", "a painting by an unknown painter (1890)", "Ein Hund, der bellt!",
    "we'll see them if you'd ask", "mojibake schön café", "under score user tag", "straße ünïcödé",
    " ".join(map("".join, itertools.permutations("abcdefgz", 2))),
]  # fmt: skip


def some_texts():
    """Those of the byte-pair tests, and 300 at random; none spells a special token out."""
    rng = random.Random(0)
    pieces = [
        *"abcdefgz ABÜİΣ019.,'\"!?_-()<>&’“”…é你日🍎▁\t\n\xa0\u3000",
        "the ",
        "photo",
        "&amp;",
    ]
    drawn = ["".join(rng.choices(pieces, k=rng.randint(1, 50))) for _ in range(300)]
    chosen = [text for text in STRINGS if "\x00" not in text]
    return [*chosen, *drawn, "x " * 100, "ΑΣ ΟΔΟΣ", " lead", "trail ", "! ! a", "▁▁a ▁"]


TEXTS = some_texts()


def train(path, **options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20), model_writer=model, minloglevel=3,
        hard_vocab_limit=False, pad_id=0, eos_id=1, **options,
    )  # fmt: skip
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("siglip")
    return train(folder / "spiece.model", vocab_size=400, unk_id=2, bos_id=-1)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """Byte pairs with a fallback to bytes, spaces as a mark, as in the published file."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=list(GEMMA), show_progress=False)
    trained.train_from_iterator(CORPUS, trainer)
    model = json.loads(trained.to_str())["model"]
    names = [*GEMMA, *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [name for name in model["vocab"] if name not in GEMMA]
    whole = Tokenizer(
        models.BPE(
            {name: i for i, name in enumerate(names)}, [tuple(x) for x in model["merges"]],
            fuse_unk=True, byte_fallback=True, unk_token="<unk>",
        )
    )  # fmt: skip
    whole.normalizer = normalizers.Replace(" ", "▁")
    whole.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    whole.add_special_tokens(list(GEMMA))
    whole.post_processor = processors.TemplateProcessing("$A <eos>", "$A $B <eos>", [("<eos>", 1)])
    whole.enable_padding(length=7)  # of no account: rows have the model's own length
    path = tmp_path_factory.mktemp("gemma") / "tokenizer.json"
    whole.save(str(path))
    return path


def assert_equal(ours, theirs, texts=TEXTS):
    """``ours``: FileTokenizer; ``theirs``: a tokenizer of transformers."""
    found = ours(texts)
    wanted = theirs(
        texts, padding="max_length", truncation=True, max_length=ours.context, return_tensors="np"
    ).input_ids
    assert found.dtype == np.int32 and found.shape == wanted.shape == (len(texts), ours.context)
    assert [t for t, a, b in zip(texts, found, wanted, strict=True) if (a != b).any()] == []
    assert ours.context < 8 or len(np.unique(found)) > 60, (
        "texts that use so few tokens prove little"
    )


@pytest.mark.parametrize("context", [CONTEXT, 64, 3])
def test_siglip(siglip, context):
    ours = open_tokenizer("spiece.model", siglip.parent, context)
    assert_equal(ours, transformers.SiglipTokenizer(str(siglip)))


def test_siglip2(gemma):
    ours = open_tokenizer("tokenizer.json", gemma.parent, CONTEXT)
    theirs = transformers.Siglip2Tokenizer.from_pretrained(gemma.parent, padding_side="right")
    assert_equal(ours, theirs)


def test_siglip2_by_sentencepiece(tmp_path):
    train(
        tmp_path / "tokenizer.model", model_type="bpe", vocab_size=560, byte_fallback=True,
        add_dummy_prefix=False, remove_extra_whitespaces=False, eos_piece="<eos>", bos_id=2,
        bos_piece="<bos>", unk_id=3, normalization_rule_name="identity",
        allow_whitespace_only_pieces=True,
    )  # fmt: skip
    ours = open_tokenizer("tokenizer.model", tmp_path, CONTEXT)
    options = dict(padding_side="right", add_bos_token=False, add_eos_token=True)
    theirs = transformers.GemmaTokenizer.from_pretrained(tmp_path, **options)
    lowered = ["".join(map(str.lower, text)) for text in TEXTS]
    assert_equal(ours, lambda texts, **kwargs: theirs(lowered, **kwargs))


@pytest.fixture(scope="module")
def t5(siglip, tmp_path_factory):
    """open_clip's copies of SigLIP have its vocabulary as T5's ``tokenizer.json``."""
    folder = tmp_path_factory.mktemp("t5")
    options = dict(extra_ids=0, legacy=False, pad_token="</s>")
    transformers.T5Tokenizer.from_pretrained(siglip.parent, **options).save_pretrained(folder)
    return folder / "tokenizer.json"


@pytest.mark.parametrize("kind", ["t5", "gemma"])
def test_open_clip(kind, request, tmp_path):
    """From open_clip's own configuration, and in the files that we write of it."""
    import open_clip

    path, name = request.getfixturevalue(kind), {"t5": "SigLIP", "gemma": "SigLIP2"}[kind]
    config = read_json(Path(open_clip.__file__).parent / f"model_configs/ViT-B-16-{name}.json")
    fmt, spec = model_spec(config, None, name)
    spec = replace(spec, text=replace(spec.text, context=CONTEXT))
    (tmp_path / path.name).write_bytes(path.read_bytes())
    files = {"tokenizer_config.json": tokenizer_config(spec, path)}
    for file, values in (files | open_clip_configs(fmt, spec)).items():
        write_json(tmp_path / file, values)
    theirs = open_clip.get_tokenizer(f"local-dir:{tmp_path}")
    ours = open_tokenizer(spec.tokenizer, tmp_path, CONTEXT, spec.cleaning)
    found, wanted = ours(TEXTS), theirs(TEXTS, context_length=CONTEXT).numpy()
    different = [t for t, a, b in zip(TEXTS, found, wanted, strict=True) if (a != b).any()]
    assert different == []


@pytest.mark.parametrize("kind", ["siglip", "gemma"])
def test_exported_configuration(kind, request, tmp_path):
    """AutoTokenizer of what we write beside a copy of the file: the same tokens again."""
    path = request.getfixturevalue(kind)
    spec = CLIP["siglip_b16"]
    spec = replace(spec, tokenizer=path.name, text=replace(spec.text, context=CONTEXT))
    (tmp_path / path.name).write_bytes(path.read_bytes())
    for name, values in hf_configs(spec, tokenizer_file=path).items():
        write_json(tmp_path / name, values)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.model_max_length == CONTEXT
    assert_equal(FileTokenizer(path, CONTEXT), theirs)


def test_a_class_tells_how_texts_are_cleaned(tmp_path):
    for values, told in (
        ({}, ""),
        ({"tokenizer_class": "SiglipTokenizer"}, "siglip"),
        ({"tokenizer_class": "Siglip2Tokenizer"}, ""),  # as the file itself
        ({"tokenizer_class": ["x"], "cleaning": "open_clip"}, "open_clip"),
    ):
        write_json(tmp_path / "tokenizer_config.json", values)
        assert cleaning(tmp_path) == told
    for wrong in ("none", [], None):
        write_json(tmp_path / "tokenizer_config.json", {"cleaning": wrong})
        with pytest.raises(UserError, match="cleaning=.* is not supported"):
            cleaning(tmp_path)


def test_clip_is_built_in():
    assert isinstance(open_tokenizer("clip", None, 16), Tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "tokenizer.json: no such file"),
        ("tokenizer.json", b"{}", "tokenizer.json: not a readable tokenizer file"),
        ("spiece.model", b"\xff\x00", "spiece.model: not a readable sentencepiece model"),
        ("../tokenizer.json", None, "must be 'clip' or a file beside the weights"),
        ("", None, "must be 'clip' or a file beside the weights"),
    ],
)
def test_mistakes(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        open_tokenizer(name, tmp_path, 8)
    assert "\n" not in str(error.value)


def test_a_vocabulary_without_an_end(tmp_path):
    tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [])).save(str(tmp_path / "t.json"))
    with pytest.raises(UserError, match="t.json: its vocabulary has no end token"):
        open_tokenizer("t.json", tmp_path, 8)
