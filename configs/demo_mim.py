"""The demo's student trained by masked feature prediction, the way of EVA-02 before UTA.

    uta-jax train --config=configs/demo_mim.py --workdir=runs/demo_mim

As ``configs/demo.py`` but for the objective and its mask: EVA-02 masks blocks, 105 of 256 patches
(methods of baaivision/EVA, EVA-02/asuka/README.md); the smallest block, on this small grid, is
ours. Zero-shot classification reads CLS, which this objective aligns to nothing.
"""

from demo import get_config as demo_config


def get_config():
    """See the module docstring."""
    c = demo_config()
    c.objective = "mim"
    c.mask.kind = "block"
    c.mask.ratio = 0.41
    c.mask.min_block = 4
    return c
