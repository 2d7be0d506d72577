"""The UTA step in plain PyTorch: what ``step.py`` measures ours against.

Teacher: open_clip's VisionTransformer, all tokens, its norm and projection on the kept ones only.
Student: timm's EVA-02 (or open_clip's tower, for CLIP's architecture) with the library's own patch
dropout of a fixed count. ``torch.optim.AdamW(fused=True)``, gradient clipping, cosine in fp32. In
bfloat16 the student runs under autocast and the teacher's weights are cast once, as ours are.
"""

import jax
import numpy as np
import open_clip.transformer as towers
import timm
import torch
from timm.layers import PatchDropoutWithIndices
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from uta_jax.interop import translate
from uta_jax.interop.timm_config import timm_model
from uta_jax.models.presets import ClipSpec, TextSpec, VitSpec
from uta_jax.models.text import init_text
from uta_jax.optimizer import AdamW, schedule
from uta_jax.step import Recipe


class Drop(PatchDropoutWithIndices):
    """timm's patch dropout; remembers what it kept, which the teacher has to be asked for."""

    def __init__(self, keep: int, tokens: int, returns_indices: bool):
        super().__init__(1 - keep / tokens)
        self._returns_indices = returns_indices
        self.kept = None

    def forward(self, x):
        """Tokens, CLS first -> CLS and the kept ones."""
        x, self.kept = super().forward(x)
        return (x, self.kept) if self._returns_indices else x


def clip_tower(spec: VitSpec, params: dict) -> towers.VisionTransformer:
    """open_clip's vision tower with our parameters."""
    model = towers.VisionTransformer(
        spec.image_size, spec.patch_size, spec.width, spec.depth, spec.heads,
        spec.mlp_hidden / spec.width, output_dim=spec.out_dim,
        act_layer={"quick_gelu": towers.QuickGELU, "gelu": torch.nn.GELU}[spec.act],
    )  # fmt: skip
    # The format holds both towers: a text tower of nothing stands in for the other.
    text = TextSpec(2, 8, 8, 1, 1, 8, spec.out_dim, act=spec.act)
    tree = {
        "vision": params,
        "text": init_text(text, jax.random.key(0)),
        "logit_scale": np.float32(1),
    }
    state = translate.to_theirs("open_clip", ClipSpec(spec, text), tree)
    start = "visual."
    model.load_state_dict(
        {k[len(start) :]: torch.tensor(v) for k, v in state.items() if k.startswith(start)}
    )
    return model


def eva_tower(spec: VitSpec, params: dict) -> torch.nn.Module:
    """timm's EVA-02 with our parameters."""
    clip = ClipSpec(spec, None)
    name, arguments = timm_model("timm_eva02", clip)
    model = timm.create_model(name, **arguments)
    state = translate.to_theirs("timm_eva02", clip, {"vision": params})
    model.load_state_dict({name: torch.tensor(x) for name, x in state.items()})
    return model


class TorchStep:
    """One update: ``step(image_uint8_bhwc)`` -> metrics as floats."""

    def __init__(self, recipe: Recipe, params: dict, frozen: dict):
        task = recipe.task
        self._recipe, self._task = recipe, task
        self._dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[task.dtype]
        self._is_eva = task.student.act == "swiglu"
        build = eva_tower if self._is_eva else clip_tower
        self.student = build(task.student, params["vision"]).train()
        self.teacher = clip_tower(task.teacher.vision, frozen["vision"]).eval().to(self._dtype)
        self.drop = Drop(task.mask.keep, task.student.tokens, returns_indices=self._is_eva)
        if self._is_eva:
            self.student.patch_drop = self.drop
        else:
            self.student.patch_dropout = self.drop
        for p in self.teacher.parameters():
            p.requires_grad_(False)
        self._optimizer = self._adamw(recipe.optim)
        self._lr, self._steps = schedule(recipe.optim), 0

    def _adamw(self, optim: AdamW) -> torch.optim.AdamW:
        """Matrices decay; biases, norms, positions and CLS do not."""
        names = self.student.no_weight_decay()
        decays = {n: p.ndim > 1 and n not in names for n, p in self.student.named_parameters()}
        groups = [
            {
                "params": [p for n, p in self.student.named_parameters() if decays[n] == decay],
                "weight_decay": optim.weight_decay * decay,
            }
            for decay in (True, False)
        ]
        return torch.optim.AdamW(
            groups,
            lr=optim.lr,
            betas=(optim.b1, optim.b2),
            eps=optim.eps,
            fused=True,
        )

    def _normalised(self, image_bhwc: torch.Tensor) -> torch.Tensor:
        mean, std = (torch.tensor(x)[:, None, None] for x in (self._task.mean, self._task.std))
        return (image_bhwc.permute(0, 3, 1, 2).float() / 255.0 - mean) / std

    def _student_tokens(self, image):
        if not self._is_eva:
            m = self.student
            return m.ln_post(m.transformer(m._embeds(image))) @ m.proj
        return self.student.head(self.student.forward_features(image))

    @torch.no_grad()
    def _teacher_tokens(self, image, kept_bk):
        m = self.teacher
        tokens = m.transformer(m._embeds(image))
        rows = functional.pad(kept_bk + 1, (1, 0))[:, :, None]
        tokens = tokens.gather(1, rows.expand(-1, -1, tokens.shape[-1]))
        return m.ln_post(tokens) @ m.proj

    def loss(self, image_bhwc: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss, cosines [b, 1 + k]) of uint8 pixels; ``self.drop.kept`` says which k."""
        image = self._normalised(torch.from_numpy(image_bhwc))
        with torch.autocast("cpu", self._dtype, enabled=self._dtype != torch.float32):
            student = self._student_tokens(image)
        target = self._teacher_tokens(image.to(self._dtype), self.drop.kept)
        cos = functional.cosine_similarity(student.float(), target.float(), dim=-1)
        weight = torch.ones(cos.shape[1])
        weight[0] = self._task.cls_weight
        return -(cos * weight).sum(1).mean() / weight.sum(), cos

    def gradient(self, image_bhwc: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(loss, cosines, norm of the gradient before it is clipped)."""
        self._optimizer.zero_grad(set_to_none=True)
        loss, cos = self.loss(image_bhwc)
        loss.backward()
        limit = self._recipe.optim.clip_norm or float("inf")
        return loss, cos, torch.nn.utils.clip_grad_norm_(self.student.parameters(), limit)

    def __call__(self, image_bhwc: np.ndarray) -> dict[str, float]:
        for group in self._optimizer.param_groups:
            group["lr"] = float(self._lr(self._steps))
        loss, cos, norm = self.gradient(image_bhwc)
        self._optimizer.step()
        self._steps += 1
        values = {"loss": loss, "cos_cls": cos[:, 0].mean(), "cos_patch": cos[:, 1:].mean()}
        values |= {"grad_norm": norm}
        return {name: float(x.detach()) for name, x in values.items()}


def count_flops(step: TorchStep, image_bhwc: np.ndarray) -> int:
    """Of the products in one update; PyTorch counts none inside of its fused attention."""
    torch.backends.mha.set_fastpath_enabled(False)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step.gradient(image_bhwc)
    torch.backends.mha.set_fastpath_enabled(True)
    return counter.get_total_flops()
