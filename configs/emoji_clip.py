"""The tiny teacher: a CLIP trained from scratch on emoji_scenes, captions and all.

Objective: the softmax contrastive loss of Radford et al. 2021. Every value below is ours, chosen
for two CPU cores. Its weights ship with the package as ``asset:tiny_clip``.

    uta-jax data emoji_scenes --out=data/emoji_scenes
    uta-jax train --config=configs/emoji_clip.py --workdir=runs/emoji_clip
    uta-jax export --workdir=runs/emoji_clip --format=hf --dtype=float16 \\
        --out=uta_jax/assets/tiny_clip

Result: 90.5 % zero-shot top-1 on val_single (128 classes, 1,280 images) after 192,000 images, in 20
minutes on two cores that had other work to do; chance is 0.8 %.
"""

from uta_jax.config import default_config


def get_config():
    """See the module docstring."""
    c = default_config()
    c.objective = "contrastive"
    c.student.preset = "tiny_clip"
    c.student.dtype = "float32"  # XLA:CPU is no faster in bfloat16
    c.student.remat = "names"
    c.data.path = "data/emoji_scenes"
    c.data.batch_size = 128
    c.data.crop_scale = (0.6, 1.0)  # captions name all objects: most must stay in sight
    c.optim.lr = 1e-3
    c.optim.end_lr = 0.0
    c.optim.warmup_steps = 75
    c.optim.weight_decay = 0.1
    c.optim.clip_norm = 1.0
    c.train.steps = 1500
    c.train.log_every = 20
    c.train.eval_every = 300
    c.train.save_every = 300
    c.eval.path = "data/emoji_scenes"
    c.eval.templates = ("{}", "a {}")
    return c
