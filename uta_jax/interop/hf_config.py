"""``config.json`` of Hugging Face models, both ways."""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from uta_jax import UserError
from uta_jax.data.tokenizer import CLIP_VOCAB
from uta_jax.interop.files import read_json
from uta_jax.interop.hf_processor import (
    TOKENIZER_FILES,
    cleaning,
    processor_config,
    read_processor,
    side,
    tokenizer_config,
    tokenizer_name,
)
from uta_jax.interop.keymaps.hugging_face import dinov2_hidden, dinov2_ratio, dinov2_reasons
from uta_jax.interop.specs import build, checked
from uta_jax.models.presets import ClipSpec, TextSpec, VitSpec

# Their field of a tower -> ours.
TOWER = {
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "hidden_act": "act",
    "layer_norm_eps": "ln_eps",
}
VISION = {"image_size": "image_size", "patch_size": "patch_size", **TOWER}
TEXT = {"max_position_embeddings": "context", "vocab_size": "vocab", **TOWER}
HIDDEN = {"intermediate_size": "mlp_hidden"}  # DINOv2 has a ratio instead

# What transformers takes for a field that config.json leaves out: model_type -> tower -> ours.
_BASE = dict(width=768, depth=12, heads=12, mlp_hidden=3072)
_CLIP_TOWER = dict(act="quick_gelu", ln_eps=1e-5)
_SIGLIP_TOWER = dict(act="gelu_pytorch_tanh", ln_eps=1e-6)
DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "clip": {
        "vision_config": dict(image_size=224, patch_size=32, **_BASE, **_CLIP_TOWER),
        "text_config": dict(
            context=77, vocab=49408, width=512, depth=12, heads=8, mlp_hidden=2048, **_CLIP_TOWER
        ),
    },
    "siglip": {
        "vision_config": dict(image_size=224, patch_size=16, **_BASE, **_SIGLIP_TOWER),
        "text_config": dict(context=64, vocab=32000, **_BASE, **_SIGLIP_TOWER),
    },
    "dinov2": {
        "": dict(image_size=224, patch_size=14, width=768, depth=12, heads=12, act="gelu",
                 ln_eps=1e-6),
    },
}  # fmt: skip
ACTS = {"gelu_pytorch_tanh": "gelu_tanh"}  # theirs -> ours, where the names differ
# model_type -> its first table in ``keymaps``; ``hf_format`` tells the two of DINOv2 apart.
HF_FORMATS = {"clip": "hf_clip", "siglip": "hf_siglip", "dinov2": "hf_dinov2"}


def hf_format(spec: ClipSpec) -> str:
    """The table in ``keymaps`` of the transformers model that is nearest to ``spec``."""
    if spec.text is None:
        return "hf_dinov2_swiglu" if spec.vision.act == "swiglu" else "hf_dinov2"
    return "hf_siglip" if spec.vision.pool == "map" else "hf_clip"


def hf_spec(root: Path) -> ClipSpec:
    """The specification that a Hugging Face directory describes; UserError if it is of no use."""
    where = root / "config.json"
    config = read_json(where)
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in HF_FORMATS:
        nearest = (get_close_matches(str(kind), HF_FORMATS, 1, cutoff=0.4) or ["clip"])[0]
        raise UserError(
            f"{where}: model_type {kind!r} is not supported; the nearest is {nearest!r} "
            f"({', '.join(HF_FORMATS)} are)"
        )
    return checked(READERS[kind](root, config, where), str(where))


def _clip_spec(root: Path, config: Mapping, where: Path) -> ClipSpec:
    out_dim = config.get("projection_dim", 512)
    vision = _section(config, "clip", "vision_config", VISION | HIDDEN, where)
    text = _section(config, "clip", "text_config", TEXT | HIDDEN, where)
    vision |= dict(embed_norm=True, patch_bias=False, out_dim=out_dim)
    text = build(TextSpec, text | dict(out_dim=out_dim), f"{where}: text_config")
    _check_end_token(config, text.vocab, where)
    _check_vocabulary(root, text.vocab)
    return ClipSpec(
        build(VitSpec, vision, f"{where}: vision_config"),
        text,
        **read_processor(root, "clip", vision["image_size"]),
    )


def _siglip_spec(root: Path, config: Mapping, where: Path) -> ClipSpec:
    vision = _section(config, "siglip", "vision_config", VISION | HIDDEN, where)
    text = _section(config, "siglip", "text_config", TEXT | HIDDEN, where)
    if _values(config, "vision_config").get("vision_use_head", True) is not True:
        raise UserError(f"{where}: vision_config.vision_use_head must be true, or be left out")
    vision |= dict(cls=False, pool="map", head_proj=False, out_dim=vision["width"])
    out_dim = _values(config, "text_config").get("projection_size") or text["width"]
    text |= dict(causal=False, pool="last", head_bias=True, out_dim=out_dim)
    return ClipSpec(
        build(VitSpec, vision, f"{where}: vision_config"),
        build(TextSpec, text, f"{where}: text_config"),
        **read_processor(root, "siglip", vision["image_size"]),
        logit_bias=True,
        tokenizer=tokenizer_name(root),
        cleaning=cleaning(root),
    )


def _dinov2_spec(root: Path, config: Mapping, where: Path) -> ClipSpec:
    vision = _section(config, "dinov2", "", VISION, where)
    ratio, swiglu = config.get("mlp_ratio", 4), config.get("use_swiglu_ffn", False) is True
    if type(ratio) not in (int, float) or not 0 < ratio < 100:
        raise UserError(f"{where}: mlp_ratio={ratio!r} must be a number between 0 and 100")
    vision |= dict(
        act="swiglu" if swiglu else vision["act"],
        out_dim=vision["width"],
        qkv_bias="qkv" if config.get("qkv_bias", True) else "",
        layer_scale=True,
        head_proj=False,
    )
    if type(vision["width"]) is int:  # else ``build`` says so
        vision["mlp_hidden"] = dinov2_hidden(vision["width"], ratio, swiglu)
    spec = build(VitSpec, {"mlp_hidden": 1} | vision, str(where))
    return ClipSpec(spec, None, **read_processor(root, "dinov2", spec.image_size))


READERS = {"clip": _clip_spec, "siglip": _siglip_spec, "dinov2": _dinov2_spec}


def _values(config: Mapping, section: str) -> Mapping:
    """A section of config.json; as in transformers, its old twin ``<section>_dict`` wins."""
    values = config.get(f"{section}_dict") or config.get(section) if section else config
    return values if isinstance(values, Mapping) else {}


def _section(config: Mapping, kind: str, section: str, fields: Mapping, where: Path) -> dict:
    """A tower's values under our names, defaults filled in."""
    values, defaults = _values(config, section), DEFAULTS[kind][section]
    ours = {to: values.get(theirs, defaults[to]) for theirs, to in fields.items()}
    ours["act"] = ACTS.get(str(ours["act"]), ours["act"])
    for name in ("image_size", "patch_size"):
        if name in ours:
            ours[name] = side(ours[name], f"{where}: {f'{section}.{name}'.lstrip('.')}")
    return ours


def _check_end_token(config: Mapping, vocab: int, where: Path) -> None:
    """Ours pools at the highest id; so must theirs, by that id or, where it is 2, by argmax."""
    end = _values(config, "text_config").get("eos_token_id", 49407)
    if end not in (2, vocab - 1):
        raise UserError(
            f"{where}: text_config.eos_token_id={end!r} must be the last of the {vocab} tokens"
        )


def _check_vocabulary(root: Path, vocab: int) -> None:
    """Refuse a CLIP with a tokenizer of its own: its texts would be read as CLIP's byte pairs."""
    names = ("vocab.json", "vocab.txt", *TOKENIZER_FILES)
    found = [name for name in names if (root / name).is_file()]
    if found and vocab != CLIP_VOCAB:
        raise UserError(
            f"{root / found[0]}: a tokenizer of {vocab} tokens is not supported with model_type "
            f"'clip' (CLIP's own, of {CLIP_VOCAB}, is)"
        )


def hf_configs(
    spec: ClipSpec, dtype: str = "float32", tokenizer_file: Path | None = None
) -> dict[str, dict]:
    """File name -> contents: the configuration of the model, of its image processor, its tokenizer.

    ``dtype``: that of the weights beside it. ``tokenizer_file``: what the caller copies beside
    them; its configuration is written only where it is given, and needed (not for CLIP's own).
    Raises UserError for what transformers' configuration cannot say.
    """
    kind = next(kind for kind, fmt in HF_FORMATS.items() if hf_format(spec).startswith(fmt))
    model = {"dtype": dtype, "model_type": kind, **WRITERS[kind](spec)}
    files = {"config.json": model, "preprocessor_config.json": processor_config(spec, kind)}
    if kind == "siglip" and tokenizer_file is not None:
        files["tokenizer_config.json"] = tokenizer_config(spec, tokenizer_file)
    return files


def _theirs(tower: VitSpec | TextSpec, fields: Mapping[str, str]) -> dict:
    values = {theirs: getattr(tower, ours) for theirs, ours in fields.items()}
    acts = {ours: theirs for theirs, ours in ACTS.items()}
    return values | {"hidden_act": acts.get(tower.act, tower.act)}


def _clip_config(spec: ClipSpec) -> dict:
    # CLIP's vocabulary ends with start and end of text.
    ends = dict(bos_token_id=spec.text.vocab - 2, eos_token_id=spec.text.vocab - 1)
    text = {"model_type": "clip_text_model", **_theirs(spec.text, TEXT | HIDDEN), **ends}
    vision = {"model_type": "clip_vision_model", **_theirs(spec.vision, VISION | HIDDEN)}
    return {
        "architectures": ["CLIPModel"],
        "projection_dim": spec.vision.out_dim,
        "text_config": text,
        "vision_config": vision,
    }


def _siglip_config(spec: ClipSpec) -> dict:
    # Nothing reads the ids, but their defaults lie outside of SigLIP's own vocabulary.
    ends = dict(bos_token_id=None, eos_token_id=1, projection_size=spec.text.out_dim)
    text = {"model_type": "siglip_text_model", **_theirs(spec.text, TEXT | HIDDEN), **ends}
    vision = {"model_type": "siglip_vision_model", **_theirs(spec.vision, VISION | HIDDEN)}
    return {"architectures": ["SiglipModel"], "text_config": text, "vision_config": vision}


def _dinov2_config(spec: ClipSpec) -> dict:
    vision, swiglu = spec.vision, spec.vision.act == "swiglu"
    ratio = dinov2_ratio(vision)
    if ratio is None:
        raise UserError("; ".join(dinov2_reasons(spec)))
    act = {"hidden_act": "gelu"} if swiglu else {}  # not used beside the gate
    return {
        "architectures": ["Dinov2Model"],
        **_theirs(vision, VISION),
        **act,
        "mlp_ratio": ratio,
        "qkv_bias": bool(vision.qkv_bias),
        "use_swiglu_ffn": swiglu,
    }


WRITERS = {"clip": _clip_config, "siglip": _siglip_config, "dinov2": _dinov2_config}
