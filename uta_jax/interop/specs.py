"""Specifications on disk as our own JSON, and the checks that every specification passes."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from typing import Any

from uta_jax import UserError
from uta_jax.data.tokenizer import CLEANING
from uta_jax.models.presets import ClipSpec, TextSpec, VitSpec
from uta_jax.models.vit import ACTIVATIONS

# PIL.Image.Resampling, as image processors write it. Evaluation resizes by no other filter.
PIL_FILTERS = {"bilinear": 2, "bicubic": 3}
# Of a specification and of its towers: field -> the names it may hold.
CHOICES = {
    ClipSpec: {
        "interpolation": tuple(PIL_FILTERS),
        "resize": ("shortest", "squash"),
        "cleaning": ("", *CLEANING),
    },
    VitSpec: {"act": (*ACTIVATIONS, "swiglu"), "pool": ("cls", "map")},
    TextSpec: {"act": (*ACTIVATIONS, "swiglu"), "pool": ("end", "last")},
}
# No model is larger: what a damaged configuration asks for must not be tried.
MAX_SIZE = 1 << 24
MAX_DEPTH = 1 << 10


def spec_from_json(values: Any, where: str) -> ClipSpec:
    """The specification that ``asdict`` made ``values`` of; UserError naming ``where``."""
    top = dict(values) if isinstance(values, dict) else {}
    top["vision"] = build(VitSpec, top.get("vision"), f"{where}: spec.vision")
    if top.get("text") is not None or "text" not in top:
        top["text"] = build(TextSpec, top.get("text"), f"{where}: spec.text")
    for name in ("mean", "std"):
        if name in top:
            top[name] = channels(top[name], f"{where}: spec.{name}")
    return checked(build(ClipSpec, top, f"{where}: spec"), where)


def build(cls: type, values: Any, where: str):
    """A dataclass out of JSON: every field known, the needed ones there, each of its own type."""
    kinds = {f.name: f.type for f in fields(cls)}
    needed = {f.name for f in fields(cls) if f.default is MISSING}
    values = values if isinstance(values, dict) else {}
    wrong = [f"unknown {k}" for k in sorted(values.keys() - kinds.keys())]
    wrong += [f"missing {k}" for k in sorted(needed - values.keys())]
    for name in values.keys() & kinds.keys():
        if kinds[name] is float and type(values[name]) is int:
            values[name] = float(values[name])
        if kinds[name] in (int, float, bool, str) and type(values[name]) is not kinds[name]:
            wrong.append(f"{name}={values[name]!r} is not of type {kinds[name].__name__}")
    if wrong:
        raise UserError(f"{where}: {', '.join(wrong)}")
    return cls(**values)


def checked(spec: ClipSpec, where: str) -> ClipSpec:
    """``spec`` itself; UserError naming ``where`` if no model can be made of it."""
    towers = [spec.vision] if spec.text is None else [spec.vision, spec.text]
    for part in (spec, *towers):
        for name, allowed in CHOICES[type(part)].items():
            if getattr(part, name) not in allowed:
                raise UserError(
                    f"{where}: {name} {getattr(part, name)!r} is not supported "
                    f"({', '.join(allowed)} are)"
                )
    for tower in towers:
        _check_tower(tower, where)
    if spec.resize_size and not spec.vision.image_size <= spec.resize_size <= MAX_SIZE:
        raise UserError(
            f"{where}: resize_size={spec.resize_size} must be 0 or at least the image size "
            f"{spec.vision.image_size}"
        )
    if not all(map(math.isfinite, spec.mean)):
        raise UserError(f"{where}: image mean {spec.mean} must be three finite numbers")
    if not all(0 < x < math.inf for x in spec.std):
        raise UserError(f"{where}: image std {spec.std} must be three finite numbers > 0")
    if spec.vision.image_size % spec.vision.patch_size:
        raise UserError(
            f"{where}: patch size {spec.vision.patch_size} does not divide image size "
            f"{spec.vision.image_size}"
        )
    return spec


def _check_tower(tower: VitSpec | TextSpec, where: str) -> None:
    sizes = {k: v for k, v in asdict(tower).items() if type(v) is int}
    if wrong := [f"{k}={v}" for k, v in sizes.items() if v < 1]:
        raise UserError(f"{where}: {', '.join(wrong)} must be positive")
    largest = dict.fromkeys(sizes, MAX_SIZE) | {"depth": MAX_DEPTH}
    if wrong := [f"{k}={v:.3g}" for k, v in sizes.items() if v > largest[k]]:
        raise UserError(f"{where}: {', '.join(wrong)} is larger than any model's")
    if tower.width % tower.heads:
        raise UserError(f"{where}: {tower.heads} heads do not divide width {tower.width}")
    if not 0 < tower.ln_eps < math.inf:
        raise UserError(f"{where}: ln_eps={tower.ln_eps} must be a finite number > 0")
    theta = getattr(tower, "rope_theta", 0.0)
    if not 0 <= theta < math.inf:
        raise UserError(f"{where}: rope_theta={theta} must be a finite number >= 0")
    if theta and tower.width // tower.heads % 4:
        raise UserError(
            f"{where}: rotary positions need heads of a multiple of 4 channels, not "
            f"{tower.width // tower.heads}"
        )


def channels(values: Any, where: str) -> tuple[float, float, float]:
    """Three numbers, one for each colour; UserError naming ``where``."""
    try:
        r, g, b = (float(x) for x in values)
    except (TypeError, ValueError):
        raise UserError(f"{where}={values!r} must be three numbers") from None
    return r, g, b


def number(value: Any, where: str, kind: type | tuple = (int, float)) -> Any:
    """A finite number out of a JSON file."""
    if isinstance(value, bool) or not isinstance(value, kind) or not abs(value) < 2**63:
        raise UserError(f"{where}={value!r} must be {'an integer' if kind is int else 'a number'}")
    return value


def choice(value: Any, table: Mapping[Any, Any], where: str) -> Any:
    """What a name in a JSON file stands for."""
    if not isinstance(value, str | None) or value not in table:
        names = ", ".join(map(str, table))
        raise UserError(f"{where}={value!r} is not supported (it must be one of: {names})")
    return table[value]
