"""The demo's student trained by MaskAlign: visible tokens against several layers of the teacher.

    uta-jax train --config=configs/demo_maskalign.py --workdir=runs/demo_maskalign

As ``configs/demo.py`` but for the objective and what its authors publish: 70 % masked, patches
drawn by the teacher's attention, betas 0.9 and 0.95, no clipping (OpenDriveLab/maskalign,
README.md, main_pretrain.py). The student has no part in the space of the texts: it is judged by
its features (``knn``, ``linear_probe``), never by zero-shot classification.
"""

from demo import get_config as demo_config


def get_config():
    """See the module docstring."""
    c = demo_config()
    c.objective = "maskalign"
    c.mask.kind = "attention"
    c.mask.ratio = 0.7
    c.eval.names = ("knn",)
    c.optim.b2 = 0.95
    c.optim.clip_norm = 0.0
    return c
