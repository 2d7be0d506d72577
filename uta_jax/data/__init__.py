"""Examples to batches: sources, tokenizer, transforms, loader, and the emoji_scenes dataset.

Nothing is imported here, so that the processes that draw emoji scenes load neither JAX nor grain.
"""
