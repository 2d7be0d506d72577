"""UTA-g/14 at 224 px, trained from scratch against EVA01-CLIP-g-14-plus.

As ``configs/uta_b16.py``, whose docstring explains the marks. EVA-02 has no g, so the schedule is
that of EVA-01 g masked image modelling [EVA-01] (baaivision/EVA, EVA-01/eva/README.md).

    uta-jax train --config=configs/uta_g14.py --workdir=runs/uta_g14 --config.mesh.fsdp=8 \\
        --config.data.path=data/imagenet21k --config.teacher.path=checkpoints/eva01_g14_plus

The teacher, where the machine is online: ``uta-jax convert
open_clip:EVA01-g-14-plus/merged2b_s11b_b114k checkpoints/eva01_g14_plus``.

Never run. Expected result and run time: not known, not measured (the authors give their g/14 at
336 px 83.9 %).
"""

from uta_b16 import get_config as base_config


def get_config():
    """See the module docstring."""
    c = base_config()
    c.student.preset = "uta_g14"  # [UTA] architecture, [ours] input size
    c.mask.ratio = 0.504  # [ours] as in configs/uta_l14.py: with CLS 128 tokens
    c.data.batch_size = 4096  # [EVA-01]
    c.optim.lr = 1e-3  # [EVA-01]
    c.optim.warmup_epochs = 2.0  # [EVA-01]; its drop-path of 0.1 is left out [ours]
    c.train.epochs = 150.0  # [EVA-01]
    return c
