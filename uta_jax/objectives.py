"""Training objectives: pure functions ``(params, frozen, batch, rng, task) -> (loss, metrics)``.

``params`` is what trains, ``frozen`` the teacher (an argument, so no gradient and no optimizer
state can reach it), ``task`` the static facts. Losses and cosines are fp32 whatever the towers
compute in.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax import Array

from uta_jax import masking, mesh
from uta_jax.data.transforms import to_input
from uta_jax.models.heads import LayerHeads
from uta_jax.models.presets import ClipSpec, TextSpec, VitSpec, with_vision
from uta_jax.models.text import TextTower, init_text
from uta_jax.models.vit import Seen, Vit, encode_seen, gather_tokens, init_vit

MAX_LOG_SCALE = math.log(100.0)  # Radford et al. 2021, section 2.5
DECODER = "decoder"  # the parameters that train with the towers and end with the training
# (kind of TPU, CLS apart) -> bytes of a group of images between the products of a teacher's MLP;
# where groups make the step shorter by the compiler's estimate.
GROUP_BYTES = {
    ("TPU v5 lite", False): 52 * 2**20,
    ("TPU v5 lite", True): 52 * 2**20,
    ("TPU v5", False): 80 * 2**20,
    ("TPU v6 lite", False): 52 * 2**20,
}
MAX_GROUPS = 8  # each is compiled
LAYER_TARGETS = 5  # the last layers of the teacher that MaskAlign predicts (``top5``)


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
    unroll: bool = False  # the blocks of both towers, to count operations

    @property
    def clip(self) -> ClipSpec:
        """What the student becomes: its vision tower with the text tower it is aligned to.

        A tower alone, ``text`` None, where the objective aligns it to no text.
        """
        if self.teacher and OBJECTIVES[self.objective].joint_space:
            return with_vision(self.teacher, self.student)
        return ClipSpec(self.student, self.text, self.mean, self.std)

    def vit(self) -> Vit:
        """The student's module."""
        return Vit(self.student, jnp.dtype(self.dtype), self.remat, self.unroll)

    def teacher_vit(self) -> Vit:
        """The teacher's vision module."""
        return Vit(self.teacher.vision, jnp.dtype(self.teacher_dtype), unroll=self.unroll)


@dataclass(frozen=True)
class Objective:
    """A loss, the initialiser of the parameters that it trains, and where these may go."""

    loss: Callable[[dict, dict, dict, Array, Task], tuple[Array, dict]]
    init: Callable[[Array, Task], dict]
    needs_teacher: bool
    needs_text: bool
    joint_space: bool = True  # the student projects into the space of a text tower
    masks: tuple[str, ...] = masking.KINDS  # that it can use; (): it sees whole images
    by_example: bool = True  # a mean over examples that know nothing of each other
    drops: bool = True  # masked patches are not run on (mim puts a token in their place)
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
    seen = run_teacher(frozen, image_bhwc, task)
    return _projected(frozen, seen.tokens_bkd, with_cls(keep_bk), task)


def run_teacher(
    frozen: dict, image_bhwc: Array, task: Task, layers: bool = False, attention: bool = False
) -> Seen:
    """The teacher's pass over whole images, uint8 [b, h, w, 3], without gradient."""
    spec, vit = task.teacher, task.teacher_vit()
    image_bhwc = to_input(image_bhwc, spec.mean, spec.std, spec.vision.image_size, vit.dtype)
    look = partial(encode_seen, layers=layers, attention=attention)
    on_tpu = vit
    if not (layers or attention):
        # Patches that do not fill a TPU's tiles gain nothing from being without CLS.
        split = spec.vision.cls and spec.vision.tokens % 128 == 0
        groups = _groups(spec.vision, len(image_bhwc), split)
        on_tpu = vit.clone(split=split, groups=groups)
    seen = jax.lax.platform_dependent(
        frozen["vision"], image_bhwc, tpu=partial(look, on_tpu), default=partial(look, vit)
    )
    return jax.lax.stop_gradient(seen)


def _groups(spec: VitSpec, batch: int, split: bool) -> int:
    """The fewest groups of a device's images that ``GROUP_BYTES`` allows; 1 where none does."""
    images = batch // mesh.batch_parts()
    hidden_bytes = 2 * (spec.tokens + spec.cls) * spec.mlp_hidden
    most = GROUP_BYTES.get((mesh.device_kind(), split), 0) // hidden_bytes
    allowed = (g for g in range(1, MAX_GROUPS + 1) if images % g == 0 and images // g <= most)
    return next(allowed, 1)


def draw_mask(
    rng: Array | masking.Share, batch: int, task: Task, teacher: Seen | None = None
) -> Array:
    """``keep_bk`` of an update; ``teacher``: its pass, where ``by_attention(task)``."""
    weight_bn = teacher.cls_attention_bk[:, 1:] if by_attention(task) else None
    return masking.sample(rng, batch, task.student.grid, task.mask, weight_bn)


def by_attention(task: Task) -> bool:
    """Whether masks depend on what the teacher attends to."""
    return task.mask.kind in masking.WEIGHTED


def with_cls(keep_bk: Array) -> Array:
    """Indices of patches -> of tokens [b, 1 + k], where CLS has number 0."""
    return jnp.pad(keep_bk + 1, ((0, 0), (1, 0)))


def _projected(frozen: dict, tokens_bnt: Array, place_bk: Array, task: Task) -> Array:
    """The teacher's tokens at ``place_bk`` in the joint space, without gradient."""
    tokens_bkt = gather_tokens(tokens_bnt, place_bk)
    variables = {"params": frozen["vision"]}
    target_bke = task.teacher_vit().apply(variables, tokens_bkt, method="project")
    return jax.lax.stop_gradient(target_bke)


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
    teacher = run_teacher(frozen, image_bhwc, task, attention=by_attention(task))
    keep_bk = draw_mask(rng, len(image_bhwc), task, teacher)
    target_bke = _projected(frozen, teacher.tokens_bkd, with_cls(keep_bk), task)
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


def distill(params: dict, frozen: dict, batch: dict, rng: Array, task: Task) -> tuple[Array, dict]:
    """Distillation of all tokens: the loss of ``uta`` where nothing is masked.

        loss = -mean_b [ w cos(s_cls, t_cls) + sum_n cos(s_n, t_n) ] / (w + n)

    What masking saves and what it teaches is measured against it.
    """
    del rng
    image_bhwc = batch["image"]
    seen, variables = run_teacher(frozen, image_bhwc, task), {"params": frozen["vision"]}
    target_bne = task.teacher_vit().apply(variables, seen.tokens_bkd, method="project")
    student_bne = task.vit().apply({"params": params["vision"]}, student_input(image_bhwc, task))
    return alignment_loss(student_bne, jax.lax.stop_gradient(target_bne), task.cls_weight)


def mim(params: dict, frozen: dict, batch: dict, rng: Array, task: Task) -> tuple[Array, dict]:
    """Masked feature prediction as in EVA-02 (Fang et al. 2023, arXiv 2303.11331).

        loss = -mean_b mean_m cos(s_m, t_m)

    m: the masked patches; s: the student's projected tokens when a learned token stands in their
    place and all tokens run; t: the teacher's projected tokens of the whole image. CLS and what is
    visible have no loss (baaivision/EVA, EVA-02/asuka/engine_for_pretraining.py), so zero-shot
    classification by CLS reads a token that was aligned to nothing. EVA-02's damped gradient of the
    patch embedding is left out.
    """
    image_bhwc = batch["image"]
    keep_bk = draw_mask(rng, len(image_bhwc), task)
    masked_bn, place_bm = masking.complement(keep_bk, task.student.tokens)
    seen = run_teacher(frozen, image_bhwc, task)
    target_bme = _projected(frozen, seen.tokens_bkd, place_bm + 1, task)
    vit, variables = task.vit(), {"params": params["vision"]}
    blank = (masked_bn, params[DECODER]["mask_token"])
    tokens_bnd = vit.apply(variables, student_input(image_bhwc, task), blank=blank, method="encode")
    tokens_bmd = gather_tokens(tokens_bnd, place_bm + 1)
    cos_bm = cosine(vit.apply(variables, tokens_bmd, method="project"), target_bme)
    return -cos_bm.mean(), {"cos_patch": cos_bm.mean()}


def maskalign(
    params: dict, frozen: dict, batch: dict, rng: Array, task: Task
) -> tuple[Array, dict]:
    """MaskAlign (Xue et al. 2023, arXiv 2211.08887): visible tokens, several layers.

        loss = mean_m 2 smooth_l1(prediction_m, LayerNorm(teacher_m))

    m: the last ``LAYER_TARGETS`` blocks of the teacher; LayerNorm without gain and bias; over CLS
    and the kept patches; prediction: ``heads.LayerHeads`` of the outputs of all the student's
    blocks (OpenDriveLab/maskalign, models_pretrain.py: ``linear``, ``whiten``, ``smoothl1``,
    ``top5``). No loss reaches the student's final norm, nor any projection: there is none, the
    student has no part in the joint space, and zero-shot means nothing for it.
    """
    image_bhwc = batch["image"]
    teacher = run_teacher(frozen, image_bhwc, task, layers=True, attention=by_attention(task))
    keep_bk = draw_mask(rng, len(image_bhwc), task, teacher)
    decoder = _layer_heads(task)
    place_bk = with_cls(keep_bk)
    layers_mbnt = teacher.layers_lbkd[-decoder.targets :]
    target_mbkt = whiten(jax.vmap(gather_tokens, in_axes=(0, None))(layers_mbnt, place_bk))
    student = encode_seen(
        task.vit(), params["vision"], student_input(image_bhwc, task), keep_bk, layers=True
    )
    predicted_mbkt = decoder.apply({"params": params[DECODER]}, student.layers_lbkd)
    return layer_loss(predicted_mbkt, target_mbkt)


def whiten(x: Array) -> Array:
    """LayerNorm over the last axis without gain and bias, in fp32 (eps 1e-5)."""
    x = x.astype(jnp.float32)
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + 1e-5)


def layer_loss(predicted_mbkt: Array, target_mbkt: Array) -> tuple[Array, dict]:
    """The equation of ``maskalign`` on whitened targets; the loss of each layer is a metric."""
    error = optax.losses.huber_loss(predicted_mbkt.astype(jnp.float32), target_mbkt)
    loss_m = 2 * error.mean(axis=(1, 2, 3))
    return loss_m.mean(), {f"loss_layer_{m - len(loss_m)}": x for m, x in enumerate(loss_m)}


def _layer_heads(task: Task) -> LayerHeads:
    teacher = task.teacher.vision
    targets = min(LAYER_TARGETS, teacher.depth)
    return LayerHeads(teacher.depth, targets, teacher.width, jnp.dtype(task.dtype))


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


def _init_mim(key: Array, task: Task) -> dict:
    key, token_key = jax.random.split(key)
    token = jax.nn.initializers.truncated_normal(0.02)(token_key, (task.student.width,))
    return _init_student(key, task) | {DECODER: {"mask_token": token}}


def _init_maskalign(key: Array, task: Task) -> dict:
    key, heads_key = jax.random.split(key)
    layers_lbkd = jnp.zeros((task.student.depth, 1, 1, task.student.width))
    decoder = _layer_heads(task).init(heads_key, layers_lbkd)["params"]
    return _init_student(key, task) | {DECODER: decoder}


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
    "uta": Objective(uta, _init_student, True, False, masks=masking.KINDS + masking.WEIGHTED),
    "mim": Objective(mim, _init_mim, True, False, drops=False),
    "distill": Objective(distill, _init_student, True, False, masks=()),
    "maskalign": Objective(
        maskalign,
        _init_maskalign,
        True,
        False,
        joint_space=False,
        masks=masking.KINDS + masking.WEIGHTED,
    ),
    "contrastive": Objective(
        contrastive, _init_clip, False, True, masks=(), by_example=False, bound=_bound_scale
    ),
}
