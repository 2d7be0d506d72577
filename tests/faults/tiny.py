"""A recipe for runs that are killed often: a small student, made-up images, all that a run has."""

from uta_jax.config import default_config


def get_config():
    """See the module docstring."""
    c = default_config()
    c.student.preset, c.student.dtype, c.student.remat = "tiny_clip", "float32", "none"
    c.teacher.path, c.teacher.dtype = "asset:tiny_clip", "float32"
    c.data.source, c.data.path, c.data.split = "synthetic", "64x64:96", ""
    c.data.batch_size, c.data.workers = 8, 1
    c.optim.ema_decay = 0.9
    c.train.steps, c.train.log_every, c.train.save_every = 12, 1, 3
    c.eval.source, c.eval.path, c.eval.split = "synthetic", "64x64:16", ""
    c.eval.batch_size, c.train.eval_every = 8, 6
    return c
