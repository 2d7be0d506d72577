"""Model architectures: the only folder that imports flax.linen."""
