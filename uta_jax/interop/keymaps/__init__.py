"""State-dict layouts of other libraries: one table per format, read in both directions.

A row pairs one tensor of theirs with one or several of our parameters. Several are stacked along
the first axis of theirs, which is how a fused qkv or w12 matrix is split and put together again.
``{i}`` in their name is the block index, where our parameter has a leading depth axis. What a
format cannot say in rows (activations, epsilons, rotary positions) stands in its ``vision`` and
``text`` tables.

A new format is one more entry of ``FORMATS``; ``interop/translate.py`` does the rest.
"""

from uta_jax.interop.keymaps import hugging_face, open_clip, timm
from uta_jax.interop.keymaps.rows import RULES, Extra, Format, Row

__all__ = ["FORMATS", "RULES", "Extra", "Format", "Row"]

FORMATS: dict[str, Format] = {
    **hugging_face.FORMATS,
    **open_clip.FORMATS,
    **timm.FORMATS,
    "uta_jax": Format("uta-jax", ()),  # our own directory: every path is its own name
}
