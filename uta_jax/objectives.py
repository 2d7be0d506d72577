"""Training objectives: pure functions ``(params, frozen, batch, rng, task) -> (loss, metrics)``.

``params`` is what trains, ``frozen`` the teacher (an argument, so no gradient and no optimizer
state can reach it), ``task`` the static facts. Losses and cosines are fp32 whatever the towers
compute in.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jax import Array

from uta_jax import masking
from uta_jax.data.transforms import to_input
from uta_jax.models.presets import ClipSpec, TextSpec, VitSpec, with_vision
from uta_jax.models.text import TextTower, init_text
from uta_jax.models.vit import Vit, gather_tokens, init_vit

MAX_LOG_SCALE = math.log(100.0)  # Radford et al. 2021, section 2.5


@dataclass(frozen=True)
class Task:
    """What an objective must know and no gradient touches; hashable, static in a compiled step."""

    objective: str
    student: VitSpec
    mean: tuple[float, float, float]  # image statistics of the student
    std: tuple[float, float, float]
    text: TextSpec | None = None  # the text tower that trains, for objectives that train one
    teacher: ClipSpec | None = None  # at the input size at which it is run
    mask: masking.Mask = masking.Mask()
    cls_weight: float = 1.0
    dtype: str = "float32"
    teacher_dtype: str = "float32"
    remat: str = "none"

    @property
    def clip(self) -> ClipSpec:
        """What the student becomes: its vision tower with the text tower it is aligned to."""
        if self.teacher:
            return with_vision(self.teacher, self.student)
        return ClipSpec(self.student, self.text, self.mean, self.std)

    def vit(self) -> Vit:
        """The student's module."""
        return Vit(self.student, jnp.dtype(self.dtype), self.remat)


@dataclass(frozen=True)
class Objective:
    """A loss, the initialiser of the parameters that it trains, and where these may go."""

    loss: Callable[[dict, dict, dict, Array, Task], tuple[Array, dict]]
    init: Callable[[Array, Task], dict]
    needs_teacher: bool
    needs_text: bool
    bound: Callable[[dict], dict] = lambda params: params  # applied to them after each update


def cosine(a: Array, b: Array) -> Array:
    """Cosine along the last axis in fp32; a zero vector has cosine 0 and a finite gradient."""
    return jnp.sum(normalize(a) * normalize(b), axis=-1)


def normalize(x: Array) -> Array:
    """``x / |x|`` along the last axis, in fp32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)


def teacher_tokens(frozen: dict, image_bhwc: Array, keep_bk: Array, task: Task) -> Array:
    """The teacher's projected tokens at CLS and ``keep_bk``: [b, 1 + k, e], without gradient.

    All tokens attend; the final norm and projection run on the gathered ones only.
    """
    spec = task.teacher
    dtype = jnp.dtype(task.teacher_dtype)
    image_bhwc = to_input(image_bhwc, spec.mean, spec.std, spec.vision.image_size, dtype)
    module, variables = Vit(spec.vision, dtype), {"params": frozen["vision"]}
    tokens_bnt = module.apply(variables, image_bhwc, method="encode")
    with_cls_bk = jnp.pad(keep_bk + 1, ((0, 0), (1, 0)))  # index 0 is CLS
    tokens_bkt = gather_tokens(tokens_bnt, with_cls_bk)
    return jax.lax.stop_gradient(module.apply(variables, tokens_bkt, method="project"))


def student_input(image_bhwc: Array, task: Task) -> Array:
    """uint8 pixels -> what the student's tower takes."""
    return to_input(image_bhwc, task.mean, task.std, task.student.image_size, jnp.dtype(task.dtype))


def uta(params: dict, frozen: dict, batch: dict, rng: Array, task: Task) -> tuple[Array, dict]:
    """Unmasked Token Alignment (Liu et al. 2024, arXiv 2405.19009).

        loss = -mean_b [ w cos(s_cls, t_cls) + sum_k cos(s_k, t_k) ] / (w + k)

    s: the student's projected tokens when it sees CLS and the k kept patches alone; t: the
    teacher's projected tokens at the same places, of the whole image; w: ``task.cls_weight`` (1
    weighs CLS as one token among the others; whether the paper weighs it is not public).
    """
    image_bhwc = batch["image"]
    keep_bk = masking.sample(rng, image_bhwc.shape[0], task.student.grid, task.mask)
    target_bke = teacher_tokens(frozen, image_bhwc, keep_bk, task)
    student_bke = task.vit().apply(
        {"params": params["vision"]}, student_input(image_bhwc, task), keep_bk
    )
    return alignment_loss(student_bke, target_bke, task.cls_weight)


def alignment_loss(student_bke: Array, target_bke: Array, cls_weight: float) -> tuple[Array, dict]:
    """The equation of ``uta`` on projected tokens [b, 1 + k, e], CLS first."""
    cos_bk = cosine(student_bke, target_bke)
    weight_k = jnp.ones(cos_bk.shape[1]).at[0].set(cls_weight)
    loss_b = -(cos_bk * weight_k[None]).sum(axis=1) / weight_k.sum()
    return loss_b.mean(), {"cos_cls": cos_bk[:, 0].mean(), "cos_patch": cos_bk[:, 1:].mean()}


def contrastive(
    params: dict, frozen: dict, batch: dict, rng: Array, task: Task
) -> tuple[Array, dict]:
    """CLIP's softmax loss (Radford et al. 2021, figure 3) over the global batch.

        logits = exp(s) I T'     loss = (CE(logits, diagonal) + CE(logits', diagonal)) / 2

    I, T: L2-normalised image (CLS) and text features [b, e]; s: the learned log scale, held in
    [0, ln 100] after each update (``_bound_scale``).
    """
    del frozen, rng
    vit, variables = task.vit(), {"params": params["vision"]}
    image_bhwc = student_input(batch["image"], task)
    image_be = normalize(vit.apply(variables, image_bhwc, method="features"))
    text = TextTower(task.text, jnp.dtype(task.dtype))
    text_be = normalize(text.apply({"params": params["text"]}, batch["text"]))
    scale = jnp.exp(params["logit_scale"])
    logits_bb = scale * jnp.matmul(image_be, text_be.T, precision="highest")
    place_b = jnp.arange(logits_bb.shape[0])
    cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels
    loss_b = (cross_entropy(logits_bb, place_b) + cross_entropy(logits_bb.T, place_b)) / 2
    matched = jnp.argmax(logits_bb, axis=-1) == place_b
    return loss_b.mean(), {"logit_scale": scale, "batch_top1": matched.mean()}


def _init_student(key: Array, task: Task) -> dict:
    return {"vision": init_vit(task.student, key)}


def _init_clip(key: Array, task: Task) -> dict:
    vision_key, text_key = jax.random.split(key)
    return {
        "vision": init_vit(task.student, vision_key),
        "text": init_text(task.text, text_key),
        "logit_scale": jnp.log(jnp.float32(1 / 0.07)),
    }


def _bound_scale(params: dict) -> dict:
    """The parameter itself is clipped: clipped in the loss, its gradient would vanish beyond."""
    return params | {"logit_scale": jnp.clip(params["logit_scale"], 0.0, MAX_LOG_SCALE)}


OBJECTIVES: dict[str, Objective] = {
    "uta": Objective(uta, _init_student, needs_teacher=True, needs_text=False),
    "contrastive": Objective(
        contrastive, _init_clip, needs_teacher=False, needs_text=True, bound=_bound_scale
    ),
}
