"""UTA on a laptop: a student from scratch, aligned to ``asset:tiny_clip`` without labels or text.

    make demo          # or, step by step:
    uta-jax data emoji_scenes --out=data/emoji_scenes
    uta-jax train --config=configs/demo.py --workdir=runs/demo
    uta-jax evaluate --workdir=runs/demo
    uta-jax export --workdir=runs/demo --format=hf --out=runs/demo/exported

Student and teacher are of one architecture, that of CLIP, so that the student can be exported to
transformers.CLIPModel; ``--config.student.preset=uta_tiny`` trains one with the traits of the
released UTA models instead (RoPE, SwiGLU, sub-LN), which exports to their format. The budget and
every value are ours.
"""

from uta_jax.config import default_config


def get_config():
    """See the module docstring."""
    c = default_config()
    c.student.preset = "tiny_clip"
    c.student.dtype = "float32"  # XLA:CPU is no faster in bfloat16
    c.student.remat = "none"
    c.teacher.path = "asset:tiny_clip"
    c.teacher.dtype = "float32"
    c.mask.kind = "random"
    c.mask.ratio = 0.5
    c.loss.cls_weight = 8.0  # zero-shot reads CLS, and a short run has to learn it soon
    c.data.path = "data/emoji_scenes"
    c.data.batch_size = 64  # more updates in the same time
    c.data.crop_scale = (0.6, 1.0)
    c.optim.lr = 2e-3
    c.optim.warmup_steps = 50
    c.optim.weight_decay = 0.05
    c.optim.clip_norm = 3.0
    c.train.steps = 1200
    c.train.log_every = 20
    c.train.eval_every = 300
    c.train.save_every = 300
    c.train.panels = 8
    c.eval.path = "data/emoji_scenes"
    c.eval.templates = ("{}", "a {}")
    c.eval.captions.split = c.eval.masks.split = "val_scenes"  # for retrieval and dense
    return c
