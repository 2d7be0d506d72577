"""How near the student's tokens are to the teacher's: cosine by position, and linear CKA.

Both see every patch of the same pixels, as the training's teacher does. CKA (Kornblith et al. 2019,
equation 5): ``|Y'X|^2 / (|X'X| |Y'Y|)`` in Frobenius norms, of centred unit tokens.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from uta_jax import UserError
from uta_jax import mesh as meshes
from uta_jax.evals.features import transform_in_words
from uta_jax.evals.setting import Setting
from uta_jax.models.encode import encode_images
from uta_jax.objectives import normalize

HEADLINE = ("cos_cls", "cos_patch", "cka_cls", "cka_patch")


def run(params: dict, frozen: dict, cfg: Setting) -> dict[str, float]:
    """cos_cls, cos_patch, cka_cls, cka_patch, n, and ``position/ROW,COLUMN``: its mean cosine."""
    if cfg.teacher is None:
        raise UserError("eval alignment: this run has no teacher; leave alignment out")
    source, teacher = cfg.data("test"), cfg.features.placed(frozen["vision"])
    encode = partial(encode_images, teacher, spec=cfg.teacher, tokens=True)
    sums = None
    for student_bne, batch in cfg.features.tokens(params["vision"], cfg.spec, source):
        found = _sums(student_bne, encode(batch["image"]), batch["valid"])
        # Added in float64: CKA is a small difference of large sums.
        found = jax.tree.map(np.float64, meshes.fetch(found))
        sums = found if sums is None else jax.tree.map(np.add, sums, found)
    cos_n = sums["cos"] / sums["n"]
    grid = range(cfg.spec.vision.grid)
    positions = zip(((row, column) for row in grid for column in grid), cos_n[1:], strict=True)
    return {
        "cos_cls": float(cos_n[0]),
        "cos_patch": float(cos_n[1:].mean()),
        "cka_cls": cka(sums["cls"], sums["n"]),
        "cka_patch": cka(sums["patch"], sums["n"] * len(cos_n[1:])),
        "n": int(sums["n"]),
    } | {f"position/{row},{column}": float(x) for (row, column), x in positions}


def protocol(cfg: Setting) -> dict[str, object]:
    """What has to be known beside the numbers."""
    size = cfg.teacher.vision.image_size if cfg.teacher else 0
    return {"images": transform_in_words(cfg.spec), "teacher": f"the same pixels at {size}"}


@jax.jit
def _sums(student_bne: Array, teacher_bne: Array, valid_b: Array) -> dict:
    """Sums over the valid images, of cosines by position [1 + n] and for both kinds of CKA."""
    weight_b11 = valid_b.astype(jnp.float32)[:, None, None]
    # A row of filling becomes zero, and adds nothing to any sum.
    student_bne, teacher_bne = (normalize(x) * weight_b11 for x in (student_bne, teacher_bne))
    return {
        "cos": (student_bne * teacher_bne).sum(axis=(0, 2)),
        "cls": _moments(student_bne[:, :1], teacher_bne[:, :1]),
        "patch": _moments(student_bne[:, 1:], teacher_bne[:, 1:]),
        "n": valid_b.sum(),
    }


def _moments(x_bne: Array, y_bne: Array) -> dict:
    product = partial(jnp.einsum, "bne,bnf->ef", precision="highest")
    return {
        "x": x_bne.sum(axis=(0, 1)),
        "y": y_bne.sum(axis=(0, 1)),
        "xx": product(x_bne, x_bne),
        "yy": product(y_bne, y_bne),
        "yx": product(y_bne, x_bne),
    }


def cka(sums: dict, count: float) -> float:
    """Linear CKA from sums and sums of products of ``count`` tokens."""

    def norm(products: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
        return float(np.linalg.norm(products - np.outer(a, b) / count))

    x, y = sums["x"], sums["y"]
    below = norm(sums["xx"], x, x) * norm(sums["yy"], y, y)
    return norm(sums["yx"], y, x) ** 2 / below if below else float("nan")
