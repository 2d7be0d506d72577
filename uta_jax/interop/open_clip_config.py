"""``open_clip_config.json``, both ways."""

from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from uta_jax import UserError
from uta_jax.interop import timm_config, translate
from uta_jax.interop.files import read_json
from uta_jax.interop.specs import build, channels, checked, choice, number
from uta_jax.models.presets import OPENAI_MEAN, OPENAI_STD, ClipSpec, TextSpec, VitSpec

OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = "open_clip_model.safetensors"

# Their field -> (ours, what open_clip takes where it is left out).
_VISION = {
    "image_size": ("image_size", 224),
    "patch_size": ("patch_size", 16),
    "width": ("width", 768),
    "layers": ("depth", 12),
}
_TEXT = {
    "context_length": ("context", 77),
    "vocab_size": ("vocab", 49408),
    "width": ("width", 512),
    "heads": ("heads", 8),
    "layers": ("depth", 12),
}
# Other fields -> the values under which the model is one of ours, their default first; None: any,
# for no feature depends on it.
_BLOCK_FIXED = {
    "ls_init_value": (None,),
    "block_type": (None, "default"),
    "qk_norm": (False,),
    "scaled_cosine_attn": (False,),
    "scale_heads": (False,),
    "scale_attn_inner": (False,),
    "scale_attn": (False,),
    "scale_fc": (False,),
    "output_tokens": None,
    "final_ln_after_pool": None,
    "xattn": None,  # EVA-CLIP's, as fused...: another implementation of the same attention
}
_VISION_FIXED = _BLOCK_FIXED | {
    "patch_dropout": (0.0, None),
    "attentional_pool": (False,),
    "attn_pooler_queries": None,
    "attn_pooler_heads": None,
    "pos_embed_type": ("learnable",),
    "pool_type": ("tok",),
    "timm_model_name": None,  # read before these are
    "timm_model_pretrained": None,
    "timm_pool": None,
    "timm_proj": None,
    "timm_proj_bias": None,
    "timm_drop": None,
    "timm_drop_path": None,
}
_TEXT_FIXED = _BLOCK_FIXED | {
    "embed_cls": (False,),
    "proj_type": ("linear",),
    "hf_model_name": (None,),
    "hf_model_pretrained": None,
    "hf_proj_type": None,
    "hf_pooler_type": None,
    "tokenizer_mode": None,
    "pad_id": None,
    "eos_id": None,
}
_TOP_FIXED = {
    "nonscalar_logit_scale": (False,),
    "init_logit_scale": None,
    "output_dict": None,
    "cast_dtype": None,
}
_POOLS = {"argmax": "end", "last": "last"}
# Tokenizers of open_clip that are no CLIP byte pairs, by the size of their vocabulary.
_TOKENIZERS = {
    32000: "timm/ViT-B-16-SigLIP",
    250000: "timm/ViT-B-16-SigLIP-i18n-256",
    256000: "timm/ViT-B-16-SigLIP2",
}
# tokenizer_kwargs.clean of a tokenizer with a name -> ours, which is transformers' where texts are
# lower-cased: open_clip also mends Unicode and collapses spaces then.
_CLEANING = {"canonicalize": "open_clip", "lower": "lower"}
_THEIR_CLEANING = {ours: theirs for theirs, ours in _CLEANING.items()} | {"siglip": "canonicalize"}


def open_clip_spec(path: Path) -> tuple[str, ClipSpec]:
    """Format and specification that an ``open_clip_config.json`` describes."""
    values = read_json(path)
    model = values.get("model_cfg", values)
    return model_spec(model, values.get("preprocess_cfg"), str(path), path.parent)


def model_spec(
    model: Any, preprocess: Any, where: str, folder: Path | None = None
) -> tuple[str, ClipSpec]:
    """Format and specification of a ``model_cfg`` and ``preprocess_cfg`` of open_clip.

    ``folder``: where the ``config.json`` of a timm tower lies that is not made by its name alone.
    Raises UserError naming ``where`` and the field, where the model is not one of ours.
    """
    model = _section(model, where)
    vision_cfg = _section(model.pop("vision_cfg", None), f"{where}: vision_cfg")
    text_cfg = _section(model.pop("text_cfg", None), f"{where}: text_cfg")
    quick, out_dim = model.pop("quick_gelu", False), model.pop("embed_dim", None)
    custom, logit_bias = model.pop("custom_text", False), model.pop("init_logit_bias", None)
    if "multimodal_cfg" in model:
        raise UserError(f"{where}: has a multimodal_cfg: CoCa is not supported")
    if type(out_dim) is not int or out_dim < 1:
        raise UserError(f"{where}: embed_dim={out_dim!r} must be a positive number")
    _check_rest(model, _TOP_FIXED, where)
    named = bool(text_cfg.get("hf_tokenizer_name"))
    cleaning = _cleaning(text_cfg.pop("tokenizer_kwargs", None), named, f"{where}: text_cfg")
    text = _text_spec(text_cfg, quick, out_dim, f"{where}: text_cfg")
    if vision_cfg.get("timm_model_name"):
        kind, vision = _timm_tower(vision_cfg, out_dim, f"{where}: vision_cfg", folder)
        fmt = _timm_format(kind, text, where)
        if not custom:
            raise UserError(f"{where}: a timm tower is read with custom_text=true only")
    else:
        fmt = "open_clip_text" if custom else "open_clip"
        vision = _vision_spec(vision_cfg, quick, out_dim, f"{where}: vision_cfg")
    spec = ClipSpec(
        vision, text, logit_bias=logit_bias is not None,
        tokenizer="tokenizer.json" if named else "clip", cleaning=cleaning,
        **_pixels(preprocess, where),
    )  # fmt: skip
    reasons = translate.misfits(fmt, checked(spec, where))
    if reasons:
        raise UserError(f"{where}: {'; '.join(reasons)}")
    return fmt, spec


def _section(values: Any, where: str) -> dict:
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: must be one JSON object")
    return dict(values)


def _check_rest(values: Mapping, fixed: Mapping[str, tuple | None], where: str) -> None:
    for name, value in values.items():
        if name not in fixed and not name.startswith("fused"):
            nearest = get_close_matches(name, fixed, 1, cutoff=0.0)[0]
            raise UserError(f"{where}: {name}={value!r} is not known (the nearest is {nearest!r})")
        allowed = fixed.get(name)
        if allowed is not None and value not in allowed:
            raise UserError(f"{where}: {name}={value!r} is not supported (only {allowed[0]!r} is)")


def _take(cfg: dict, table: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    return {ours: cfg.pop(theirs, default) for theirs, (ours, default) in table.items()}


def _block_traits(cfg: dict, width: Any, quick: bool, where: str) -> dict[str, Any]:
    """What both of open_clip's own towers say alike: hidden width, activation, epsilon."""
    norm, act = cfg.pop("norm_kwargs", None) or {}, cfg.pop("act_kwargs", None) or {}
    number(width, f"{where}: width", int)
    ratio = number(cfg.pop("mlp_ratio", 4.0), f"{where}: mlp_ratio")
    if not isinstance(norm, dict) or norm.keys() - {"eps"}:
        raise UserError(f"{where}: norm_kwargs={norm!r} is not supported (only eps is)")
    if act not in ({}, {"approximate": "none"}, {"approximate": "tanh"}) or (act and quick):
        raise UserError(f"{where}: act_kwargs={act!r} is not supported (approximate is)")
    tanh = act.get("approximate") == "tanh"
    return dict(
        mlp_hidden=int(width * ratio),
        act="quick_gelu" if quick else "gelu_tanh" if tanh else "gelu",
        ln_eps=norm.get("eps", 1e-5),
    )


def _vision_spec(cfg: dict, quick: bool, out_dim: int, where: str) -> VitSpec:
    ours = _take(cfg, _VISION)
    if not isinstance(ours["depth"], int):
        raise UserError(f"{where}: layers={ours['depth']!r} is a ResNet, which is not supported")
    ours |= _block_traits(cfg, ours["width"], quick, where)
    head = number(cfg.pop("head_width", 64), f"{where}: head_width", int)
    ours["heads"] = ours["width"] // max(head, 1)
    ours["embed_norm"] = not cfg.pop("no_ln_pre", False)
    _check_rest(cfg, _VISION_FIXED, where)
    return build(VitSpec, ours | dict(patch_bias=False, out_dim=out_dim), where)


def _text_spec(cfg: dict, quick: bool, out_dim: int, where: str) -> TextSpec:
    if cfg.get("hf_model_name"):
        raise UserError(f"{where}: hf_model_name={cfg['hf_model_name']!r} is not supported")
    cfg.pop("hf_tokenizer_name", None)
    ours = _take(cfg, _TEXT)
    ours |= _block_traits(cfg, ours["width"], quick, where)
    pool = choice(cfg.pop("pool_type", "argmax"), _POOLS, f"{where}: pool_type")
    ours |= dict(pool=pool, out_dim=out_dim)
    ours["causal"] = not cfg.pop("no_causal_mask", False)
    ours["head_bias"] = cfg.pop("proj_bias", False)
    _check_rest(cfg, _TEXT_FIXED, where)
    return build(TextSpec, ours, where)


def _cleaning(kwargs: Any, named: bool, where: str) -> str:
    """How texts are cleaned; CLIP's own tokenizer does it in one way."""
    kwargs = {} if kwargs is None else kwargs
    if not isinstance(kwargs, dict) or kwargs.keys() - {"clean"}:
        raise UserError(f"{where}: tokenizer_kwargs={kwargs!r} is not supported (only clean is)")
    table = _CLEANING if named else {"lower": ""}
    default = "whitespace" if named else "lower"
    return choice(kwargs.get("clean", default), table, f"{where}: tokenizer_kwargs.clean")


def _timm_tower(cfg: dict, out_dim: int, where: str, folder: Path | None) -> tuple[str, VitSpec]:
    """As open_clip/timm_model.py makes it: by its name, its pooling and the width of its head."""
    name, side = cfg["timm_model_name"], cfg.get("image_size", 224)
    proj, pool = cfg.get("timm_proj", "linear"), cfg.get("timm_pool", "avg")
    placed = str(name).startswith(("local-dir:", "hf-hub:"))
    if not placed:
        timm_config.architecture(name, where)
    if proj not in (None, "", "none"):
        raise UserError(f"{where}: timm_proj={proj!r} is not supported (null and 'none' are)")
    _check_rest(cfg, _VISION_FIXED | {"image_size": None}, where)
    args = dict(num_classes=0 if proj == "none" else out_dim, global_pool=pool)
    if placed:
        fmt, vision = _beside(name, args, where, folder)
    else:
        fmt, vision = timm_config.tower(name, args, where)
    if vision.image_size != side:
        raise UserError(
            f"{where}: image_size={side!r} is not that of {name!r}, {vision.image_size}"
        )
    if vision.out_dim != out_dim:
        raise UserError(
            f"{where}: {name!r} gives {vision.out_dim} features, not embed_dim={out_dim}"
        )
    return fmt, vision


def _beside(name: str, args: dict, where: str, folder: Path | None) -> tuple[str, VitSpec]:
    """A tower with arguments. Only the file beside this one is read: names may lead anywhere."""
    if folder is None or not (folder / "config.json").is_file():
        raise UserError(f"{where}: timm_model_name={name!r} needs its config.json beside this file")
    return timm_config.directory_tower(folder / "config.json", args)


def _timm_format(kind: str, text: TextSpec, where: str) -> str:
    fmt = {"timm_vit": "open_clip_siglip"}.get(kind, kind.replace("timm", "open_clip"))
    if fmt not in translate.FORMATS:
        raise UserError(f"{where}: a tower of format {kind!r} is not supported in open_clip")
    if (fmt == "open_clip_siglip") != text.head_bias:
        raise UserError(
            f"{where}: text_cfg: proj_bias={text.head_bias} with {kind!r}: not supported"
        )
    return fmt


def _pixels(preprocess: Any, where: str) -> dict[str, Any]:
    """How open_clip prepares an image for evaluation, in our fields."""
    values = preprocess if isinstance(preprocess, Mapping) else {}
    if values.get("interpolation") == "random":  # in training alone
        values = {**values, "interpolation": "bicubic"}
    mode = values.get("resize_mode", "shortest")
    choice(mode, dict.fromkeys(("shortest", "squash")), f"{where}: resize_mode")
    statistics = {}
    for name, default in (("mean", OPENAI_MEAN), ("std", OPENAI_STD)):
        value = values.get(name, default)
        value = [value] * 3 if isinstance(value, float) else value
        statistics[name] = channels(value, f"{where}: preprocess_cfg.{name}")
    return dict(resize=mode, interpolation=timm_config.interpolation(values, where), **statistics)


def open_clip_misfits(fmt: str, spec: ClipSpec, home: str = "") -> list[str]:
    """Why ``open_clip_configs`` cannot describe ``spec``, one short reason each."""
    reasons = translate.misfits(fmt, spec)
    if spec.resize_size not in (0, spec.vision.image_size):
        reasons.append(f"resize_size = {spec.resize_size} (it resizes to the input size)")
    if spec.tokenizer != "clip" and spec.text and spec.text.vocab not in _TOKENIZERS:
        reasons.append(f"text.vocab = {spec.text.vocab} is that of no tokenizer of its own")
    if (
        not reasons
        and _kind(fmt)
        and not home
        and not timm_config.stock_name(_kind(fmt), spec.vision)
    ):
        name, args = timm_config.timm_model(_kind(fmt), spec)
        args = {k: v for k, v in args.items() if k not in ("num_classes", "global_pool")}
        reasons.append(
            f"no timm model is this tower by its name alone (the nearest is {name!r} with {args}): "
            "name the directory or the hub repository that will hold it"
        )
    return reasons


def open_clip_configs(fmt: str, spec: ClipSpec, home: str = "") -> dict[str, dict]:
    """File name -> contents: what ``open_clip.create_model_from_pretrained`` reads.

    ``home``: "local-dir:PATH" or "hf-hub:ORG/NAME", where these files are going to lie. open_clip
    makes a timm tower by its name and gives no arguments: one that needs some is found there.
    Raises UserError where open_clip's configuration cannot describe ``spec``.
    """
    if reasons := open_clip_misfits(fmt, spec, home):
        raise UserError(f"format {fmt!r} does not fit: {'; '.join(reasons)}")
    vision, text, files = spec.vision, spec.text, {}
    if kind := _kind(fmt):
        name = timm_config.stock_name(kind, vision)
        if name is None:
            name, files = home, timm_config.timm_configs(kind, replace(spec, text=None))
        vision_cfg = {
            "image_size": vision.image_size,
            "timm_model_name": name,
            "timm_model_pretrained": False,
            "timm_pool": "token" if vision.pool == "cls" else vision.pool,
            "timm_proj": None if vision.head_proj else "none",
        }
    else:
        vision_cfg = {theirs: getattr(vision, ours) for theirs, (ours, _) in _VISION.items()}
        vision_cfg |= {"head_width": vision.width // vision.heads, **_their_traits(vision)}
        vision_cfg |= {} if vision.embed_norm else {"no_ln_pre": True}
    model = {"embed_dim": vision.out_dim, "vision_cfg": vision_cfg, "text_cfg": _text_cfg(spec)}
    model |= {"quick_gelu": True} if text.act == "quick_gelu" else {}
    model |= {} if fmt == "open_clip" else {"custom_text": True}
    model |= {"init_logit_bias": -10} if spec.logit_bias else {}
    return {OPEN_CLIP_CONFIG: {"model_cfg": model, "preprocess_cfg": _preprocess(spec)}, **files}


def _kind(fmt: str) -> str:
    """The timm format of the tower inside; empty where the tower is open_clip's own."""
    kinds = {"open_clip_eva01": "timm_eva01", "open_clip_eva02": "timm_eva02"}
    return (kinds | {"open_clip_siglip": "timm_vit"}).get(fmt, "")


def _their_traits(part: VitSpec | TextSpec) -> dict[str, Any]:
    ratio = timm_config.mlp_ratio(part.width, part.mlp_hidden)
    traits = {} if ratio == 4.0 else {"mlp_ratio": ratio}
    traits |= {} if part.ln_eps == 1e-5 else {"norm_kwargs": {"eps": part.ln_eps}}
    return traits | ({"act_kwargs": {"approximate": "tanh"}} if part.act == "gelu_tanh" else {})


def _text_cfg(spec: ClipSpec) -> dict[str, Any]:
    text = spec.text
    cfg = {theirs: getattr(text, ours) for theirs, (ours, _) in _TEXT.items()}
    cfg |= _their_traits(text)
    cfg |= {} if text.causal else {"no_causal_mask": True}
    cfg |= {"pool_type": "last"} if text.pool == "last" else {}
    cfg |= {"proj_bias": True} if text.head_bias else {}
    if spec.tokenizer != "clip":
        cfg["hf_tokenizer_name"] = _TOKENIZERS[text.vocab]
        by_file = "lower" if text.vocab == 256000 else "open_clip"
        cfg["tokenizer_kwargs"] = {"clean": _THEIR_CLEANING[spec.cleaning or by_file]}
    return cfg


def _preprocess(spec: ClipSpec) -> dict[str, Any]:
    return {
        "size": spec.vision.image_size,
        "mode": "RGB",
        "mean": list(spec.mean),
        "std": list(spec.std),
        "interpolation": spec.interpolation,
        "resize_mode": spec.resize,
        "fill_color": 0,
    }
