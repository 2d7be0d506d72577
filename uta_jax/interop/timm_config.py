"""The architectures of timm by name and argument, and the ``config.json`` of its hub, both ways."""

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from uta_jax import UserError
from uta_jax.interop import translate
from uta_jax.interop.files import read_json
from uta_jax.interop.hf_processor import side
from uta_jax.interop.specs import PIL_FILTERS, build, channels, checked, choice, number
from uta_jax.interop.timm_names import ARCHITECTURES
from uta_jax.models.presets import ClipSpec, VitSpec

# Argument of both families -> our field. What else an argument may say stands in the functions.
_FIELDS = {
    "img_size": "image_size",
    "patch_size": "patch_size",
    "embed_dim": "width",
    "depth": "depth",
    "num_heads": "heads",
}
_VIT_FIELDS = _FIELDS | {
    "class_token": "cls",
    "act_layer": "act",
    "scale_attn_norm": "attn_norm",
    "scale_mlp_norm": "mlp_norm",
    "pre_norm": "embed_norm",
}
_EVA_FIELDS = _FIELDS | {
    "class_token": "cls",
    "scale_attn_inner": "attn_norm",
    "scale_mlp": "mlp_norm",
    "use_pre_transformer_norm": "embed_norm",
}
_NUMBERS = dict.fromkeys(("embed_dim", "depth", "num_heads", "num_classes"), int) | dict.fromkeys(
    ("mlp_ratio", "rope_temperature"), (int, float)
)
# Other arguments -> the values under which the model is one of ours. None: they change nothing
# that an image's features depend on.
_FIXED: dict[str, tuple | None] = {
    "in_chans": (3,),
    "qkv_bias": (True,),
    "proj_bias": (True,),
    "qk_norm": (False,),
    "final_norm": (True,),
    "fc_norm": (None, False),
    "use_fc_norm": (None, False),
    "use_post_transformer_norm": (None, True),
    "use_post_norm": (False,),
    "use_abs_pos_emb": (True,),
    "pos_embed": ("learn",),
    "no_embed_class": (False,),
    "reg_tokens": (0,),
    "num_reg_tokens": (0,),
    "attn_type": ("eva",),
    "rope_type": ("cat",),
    "rope_grid_offset": (0, 0.0),
    "rope_grid_indexing": ("ij",),
    "rope_rotate_half": (False,),
    "swiglu_align_to": (0,),
    **dict.fromkeys(
        ("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate",
         "drop_path_rate", "weight_init", "fix_init", "head_init_scale", "dynamic_img_size",
         "dynamic_img_pad", "strict_img_size", "scriptable", "exportable", "no_jit")
    ),
}  # fmt: skip


def mlp_ratio(width: int, hidden: int) -> float:
    """The ratio which their ``int(width * ratio)`` makes ``hidden`` of."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def architecture(name: Any, where: str) -> tuple[str, VitSpec]:
    """Format and headless tower of a timm model by its name; UserError with the nearest known."""
    known = str(name).partition(".")[0]  # after the dot: whose weights
    if known not in ARCHITECTURES:
        nearest = get_close_matches(known, ARCHITECTURES, 1, cutoff=0.0)[0]
        raise UserError(
            f"{where}: timm model {name!r} is not supported; the nearest is {nearest!r}"
        )
    return ARCHITECTURES[known]


def tower(name: Any, args: Mapping[str, Any], where: str) -> tuple[str, VitSpec]:
    """Format and tower of ``timm.create_model(name, **args)``; UserError where it is not ours."""
    fmt, base = architecture(name, where)
    table, args = _fields(fmt), dict(args)
    for arg, allowed in _FIXED.items():
        value = args.pop(arg, None)
        if allowed is not None and value is not None and value not in allowed:
            raise UserError(f"{where}: {arg}={value!r} is not supported (only {allowed[-1]!r} is)")
    for arg, kind in _NUMBERS.items():
        if args.get(arg) is not None:
            number(args[arg], f"{where}: {arg}", kind)
    changes = {ours: args.pop(arg) for arg, ours in table.items() if args.get(arg) is not None}
    for name in ("image_size", "patch_size"):
        changes[name] = side(changes.get(name, getattr(base, name)), f"{where}: {name}")
    width = changes.get("width", base.width)
    ratio = args.pop("mlp_ratio", None)
    if ratio is not None:
        changes["mlp_hidden"] = int(width * ratio) // (2 if fmt == "timm_vit_swiglu" else 1)
    elif "width" in changes:
        changes["mlp_hidden"] = int(width * base.mlp_hidden / base.width)
    if "embed_norm" in changes:
        changes["patch_bias"] = not changes["embed_norm"]
    if args.pop("init_values", None) is not None:
        changes["layer_scale"] = True
    changes |= _pooling(args.pop("global_pool", None), base, where)
    classes = args.pop("num_classes", None)
    changes |= _head(1000 if classes is None else classes, width)
    if "eva" in fmt:
        fmt = _eva_kind(fmt, args, where)
        changes |= _eva_act(args) | _rope(args, base, changes)
    if args:
        raise UserError(f"{where}: timm arguments {sorted(args)} are not supported")
    return fmt, build(VitSpec, asdict(base) | changes, where)


def _fields(fmt: str) -> dict[str, str]:
    return _EVA_FIELDS if "eva" in fmt else _VIT_FIELDS


def _pooling(value: Any, base: VitSpec, where: str) -> dict:
    pools = {"token": "cls", "map": "map"}
    if base.pool != "avg":
        pools[None] = base.pool
    if value is None and base.pool == "avg":
        value = "avg"
    return {"pool": choice(value, pools, f"{where}: global_pool")}


def _head(classes: int, width: int) -> dict:
    return dict(out_dim=classes or width, head_proj=classes > 0, head_bias=classes > 0)


def _eva_kind(fmt: str, args: dict, where: str) -> str:
    fused, gated = args.pop("qkv_fused", None), args.get("swiglu_mlp")
    fused = fmt == "timm_eva01" if fused is None else fused
    gated = fmt == "timm_eva02" if gated is None else gated
    if fused == gated:
        raise UserError(
            f"{where}: qkv_fused={fused} with swiglu_mlp={gated} is not supported "
            "(EVA01 is fused and has no gate, EVA02 the opposite)"
        )
    return "timm_eva01" if fused else "timm_eva02"


def _eva_act(args: dict) -> dict:
    gated = args.pop("swiglu_mlp", None)
    return {} if gated is None else {"act": "swiglu" if gated else "gelu"}


def _rope(args: dict, base: VitSpec, changes: Mapping) -> dict:
    use, theta = args.pop("use_rot_pos_emb", None), args.pop("rope_temperature", None)
    grid = args.pop("ref_feat_shape", None)
    if not (use if use is not None else base.rope_theta):
        return {"rope_theta": 0.0}
    found = {"rope_theta": float(theta or base.rope_theta or 10000.0)}
    if grid is not None:
        found["rope_grid"] = side(grid, "ref_feat_shape")
    elif not base.rope_theta:  # their positions are then patches, whatever the size
        found["rope_grid"] = changes["image_size"] // changes["patch_size"]
    return found


def _arguments(fmt: str, vision: VitSpec) -> dict[str, Any]:
    """Every argument that says something of ``vision``, as ``timm.create_model`` takes it."""
    args = {arg: getattr(vision, ours) for arg, ours in _fields(fmt).items()}
    hidden = vision.mlp_hidden * (2 if fmt == "timm_vit_swiglu" else 1)
    args["mlp_ratio"] = mlp_ratio(vision.width, hidden)
    args["init_values"] = 1e-5 if vision.layer_scale else None
    args["global_pool"] = {"cls": "token"}.get(vision.pool, vision.pool)
    if fmt == "timm_vit_swiglu":
        del args["act_layer"]
    if "eva" in fmt:
        args["use_rot_pos_emb"] = bool(vision.rope_theta)
        if vision.rope_theta:
            args["rope_temperature"] = vision.rope_theta
            args["ref_feat_shape"] = [vision.rope_grid, vision.rope_grid]
    return args


def _beyond(fmt: str, spec: VitSpec, base: VitSpec) -> dict[str, Any] | None:
    """The arguments by which ``base`` becomes ``spec``; None where no argument can say it."""
    theirs, wanted = _arguments(fmt, base), _arguments(fmt, spec)
    args = {arg: x for arg, x in wanted.items() if x != theirs.get(arg)}
    if spec.ln_eps != base.ln_eps or None in args.values():  # timm drops arguments that are None
        return None
    if (spec.width, spec.mlp_hidden) == (base.width, base.mlp_hidden):
        args.pop("mlp_ratio", None)
    elif spec.width != base.width:
        args["mlp_ratio"] = wanted["mlp_ratio"]
    return args


def timm_model(fmt: str, spec: ClipSpec) -> tuple[str, dict[str, Any]]:
    """Name and arguments for which ``timm.create_model`` makes the vision tower of ``spec``.

    Raises UserError where format ``fmt`` cannot hold it.
    """
    reasons = translate.misfits(fmt, replace(spec, text=None, logit_bias=False))
    found = _candidates(fmt, spec.vision)
    if reasons or not found:
        reasons = reasons or ["no timm model has its norms and scales"]
        raise UserError(f"format {fmt!r} does not fit: {'; '.join(reasons)}")
    name = min(found, key=lambda name: len(found[name]))
    return name, {"num_classes": spec.vision.out_dim * spec.vision.head_proj, **found[name]}


def stock_name(fmt: str, vision: VitSpec) -> str | None:
    """The timm model that is this tower by its name, ``num_classes`` and ``global_pool`` alone."""
    found = _candidates(fmt, vision)
    return next((name for name, args in found.items() if args.keys() <= {"global_pool"}), None)


def _candidates(fmt: str, vision: VitSpec) -> dict[str, dict[str, Any]]:
    """Every model of the format that can become ``vision``, and by which arguments."""
    bases = {name: base for name, (kind, base) in ARCHITECTURES.items() if kind == fmt}
    found = {name: _beyond(fmt, vision, base) for name, base in bases.items()}
    return {name: args for name, args in found.items() if args is not None}


def timm_configs(fmt: str, spec: ClipSpec) -> dict[str, dict]:
    """File name -> contents: what ``timm.create_model("local-dir:...")`` and the hub read."""
    name, args = timm_model(fmt, spec)
    size = spec.vision.image_size
    pretrained = {
        "input_size": [3, size, size],
        "fixed_input_size": True,
        "interpolation": spec.interpolation,
        "crop_pct": _crop_share(size, spec.resize_size or size),
        "crop_mode": {"shortest": "center"}.get(spec.resize, spec.resize),
        "mean": list(spec.mean),
        "std": list(spec.std),
        "num_classes": args["num_classes"],
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    model = {
        "architecture": name,
        "num_classes": args["num_classes"],
        "num_features": spec.vision.width,
        "global_pool": _arguments(fmt, spec.vision)["global_pool"],
        "model_args": {k: v for k, v in args.items() if k != "num_classes"},
        "pretrained_cfg": pretrained,
    }
    return {"config.json": model}


def timm_spec(root: Path) -> tuple[str, ClipSpec]:
    """Format and specification that a timm directory describes; a vision tower alone."""
    where = root / "config.json"
    fmt, vision = directory_tower(where, {})
    values = _pretrained(read_json(where))
    spec = ClipSpec(vision, None, **_pixels(values, vision.image_size, str(where)))
    return fmt, checked(spec, str(where))


def directory_tower(where: Path, overrides: Mapping[str, Any]) -> tuple[str, VitSpec]:
    """Format and tower of the ``config.json`` of a timm directory; None stands for no argument."""
    config = read_json(where)
    values = _pretrained(config)
    args = config.get("model_args") or {}
    if not isinstance(args, dict):
        raise UserError(f"{where}: model_args={args!r} must be one JSON object")
    args = {name: x for given in (args, overrides) for name, x in given.items() if x is not None}
    size = values.get("input_size")
    if isinstance(size, list) and len(size) == 3:
        args.setdefault("img_size", size[1:])
    for name in ("num_classes", "global_pool"):
        given = config.get(name, values.get(name))
        if given is not None:
            args.setdefault(name, given)
    return tower(config.get("architecture"), args, str(where))


def _pretrained(config: Mapping) -> Mapping:
    values = config.get("pretrained_cfg", config)
    return values if isinstance(values, dict) else {}


def _pixels(values: Mapping, size: int, where: str) -> dict:
    """How ``timm.data.create_transform`` prepares an image for evaluation."""
    modes = {"center": "shortest", "squash": "squash"}
    share = number(values.get("crop_pct", 0.875), f"{where}: crop_pct")
    if not 0.01 <= share <= 1:
        raise UserError(f"{where}: crop_pct={share!r} must lie between 0.01 and 1")
    resized = math.floor(size / share)
    return dict(
        resize=choice(values.get("crop_mode", "center"), modes, f"{where}: crop_mode"),
        resize_size=0 if resized == size else resized,
        interpolation=interpolation(values, where),
        mean=channels(values.get("mean"), f"{where}: mean"),
        std=channels(values.get("std"), f"{where}: std"),
    )


def interpolation(values: Mapping, where: str) -> str:
    """The filter that a preprocessing section of timm or open_clip names."""
    name = values.get("interpolation", "bicubic")
    choice(name, PIL_FILTERS, f"{where}: interpolation")
    return name


def _crop_share(size: int, resized: int) -> float:
    """The ``crop_pct`` for which their ``floor(size / crop_pct)`` is ``resized``."""
    share = size / resized
    return share if math.floor(size / share) == resized else size / (resized + 0.5)
