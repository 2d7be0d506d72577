"""UTA-B/16: the released size, trained from scratch against EVA01-CLIP-g-14-plus.

Paper: Enhancing Vision-Language Model with Unmasked Token Alignment, arXiv 2405.19009. Its training
recipe is not public. Marked below: [UTA] read in the authors' released code; [EVA-02] the published
recipe of the nearest relative, EVA-02-B masked image modelling (baaivision/EVA, EVA-02/asuka);
[ours] our assumption.

    uta-jax train --config=configs/uta_b16.py --workdir=runs/uta_b16 \\
        --config.data.path=data/imagenet21k --config.teacher.path=checkpoints/eva01_g14_plus

The teacher, where the machine is online: ``uta-jax convert
open_clip:EVA01-g-14-plus/merged2b_s11b_b114k checkpoints/eva01_g14_plus``.
With any other CLIP as teacher, README ("Weights in and out") says which formats the student fits.

Never run. Expected result: not known. The authors' README gives 77.0 % ImageNet-1k zero-shot for
their B/16, which may be after contrastive fine-tuning. Run time: not measured. 150 epochs of
ImageNet-21k are 1.04 M steps.
"""

from uta_jax.config import default_config


def get_config():
    """See the module docstring."""
    c = default_config()
    c.student.preset = "uta_b16"  # [UTA]
    c.student.remat = "names"
    c.teacher.path = "checkpoints/eva01_g14_plus"  # [ours]: text tower of the released size
    c.teacher.image_size = 0  # [ours]: 196 px, a /14 teacher's 14 x 14 grid, as in MaskAlign
    c.mask.kind = "reversed_block"  # [ours]: a reversed block-wise mask is named, not specified
    c.mask.ratio = 0.5  # [ours]
    c.mask.min_block = 16  # BEiT's
    c.loss.cls_weight = 1.0  # [ours]: CLS is aligned like any token
    c.data.source = "folder"
    c.data.path = "data/imagenet21k"  # [EVA-02]
    c.data.split = ""
    c.data.batch_size = 2048  # [EVA-02]
    c.data.crop_scale = (0.2, 1.0)  # [EVA-02]
    c.data.flip = True  # [EVA-02]
    c.data.workers = 16
    c.optim.lr = 1.5e-3  # [EVA-02]
    c.optim.start_lr = 1e-6  # [EVA-02]
    c.optim.end_lr = 1e-5  # [EVA-02]
    c.optim.warmup_epochs = 1.0  # [EVA-02]
    c.optim.b1 = 0.9  # [EVA-02]
    c.optim.b2 = 0.98  # [EVA-02]; lower it against spikes of the loss (EVA issue 125)
    c.optim.eps = 1e-6  # [EVA-02]
    c.optim.weight_decay = 0.05  # [EVA-02]
    c.optim.clip_norm = 3.0  # [EVA-02]
    c.train.epochs = 150.0  # [EVA-02]
    c.train.log_every = 50
    c.train.save_every = 2500
    c.train.eval_every = 10000
    return c
