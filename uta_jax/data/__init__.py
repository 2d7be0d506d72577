"""Examples to batches: sources, tokenizer, transforms, loader, and the emoji_scenes dataset.

No library is imported here, so that the processes that draw emoji scenes load neither JAX nor
grain.
"""

from uta_jax import UserError


def printable(text: str) -> str:
    r"""The text on one line without control codes: others become \n, \x1b, \udcff and so on.

    For what comes out of files: it must neither break a line of a log nor reach the terminal.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class BadExample(UserError):
    """One example that cannot be used; the message is the reason, on one printable line.

    The loader skips such an example, counts it and puts another in its place. What breaks a whole
    dataset (a missing shard, a cut index) is a plain UserError instead.
    """

    def __init__(self, reason: str):
        super().__init__(printable(reason))
