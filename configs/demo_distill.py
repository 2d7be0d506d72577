"""The demo's student distilled from all tokens: UTA with nothing masked.

    uta-jax train --config=configs/demo_distill.py --workdir=runs/demo_distill

As ``configs/demo.py`` but for the objective; its mask is not used.
"""

from demo import get_config as demo_config


def get_config():
    """See the module docstring."""
    c = demo_config()
    c.objective = "distill"
    return c
