"""Specifications on disk as our own JSON, and the checks that every specification passes."""

import math
from dataclasses import MISSING, asdict, fields
from typing import Any

from uta_jax import UserError
from uta_jax.models.presets import ClipSpec, TextSpec, VitSpec
from uta_jax.models.vit import ACTIVATIONS

# PIL.Image.Resampling, as image processors write it. Evaluation resizes by no other filter.
PIL_FILTERS = {"bilinear": 2, "bicubic": 3}
# Field of a specification or of one of its towers -> the names it may hold.
CHOICES = {
    "act": (*ACTIVATIONS, "swiglu"),
    "pool": ("cls", "map", "end", "last"),
    "interpolation": tuple(PIL_FILTERS),
    "resize": ("shortest", "squash"),
}


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
        for name, allowed in CHOICES.items():
            if getattr(part, name, allowed[0]) not in allowed:
                raise UserError(
                    f"{where}: {name} {getattr(part, name)!r} is not supported "
                    f"({', '.join(allowed)} are)"
                )
    for tower in towers:
        sizes = {k: v for k, v in asdict(tower).items() if type(v) is int}
        if wrong := [f"{k}={v}" for k, v in sizes.items() if v < 1]:
            raise UserError(f"{where}: {', '.join(wrong)} must be positive")
        if tower.width % tower.heads:
            raise UserError(f"{where}: {tower.heads} heads do not divide width {tower.width}")
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


def channels(values: Any, where: str) -> tuple[float, float, float]:
    """Three numbers, one for each colour; UserError naming ``where``."""
    try:
        r, g, b = (float(x) for x in values)
    except (TypeError, ValueError):
        raise UserError(f"{where}={values!r} must be three numbers") from None
    return r, g, b
