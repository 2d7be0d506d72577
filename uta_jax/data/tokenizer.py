"""CLIP's byte-pair tokenizer, without PyTorch and without a download."""

import html

import ftfy
import numpy as np

START, END = 49406, 49407  # <start_of_text>, <end_of_text> in the vocabulary of CLIP


class Tokenizer:
    """Text to token ids, equal to ``open_clip.tokenizer.tokenize``.

    The one known difference: what counts as a letter. open_clip asks the newest Unicode tables, the
    wheel asks those of its build, so words in scripts added after Unicode 15 split elsewhere; and
    open_clip's case-insensitive pattern takes two more characters (U+0345, U+017F after an
    apostrophe) for letters.
    """

    def __init__(self, context: int = 77):
        """context: length of every row, start and end tokens included."""
        import instant_clip_tokenizer

        self.context = context
        self._bpe = instant_clip_tokenizer.Tokenizer()

    def __reduce__(self):
        return Tokenizer, (self.context,)  # the tables are in the library, and cannot be pickled

    def __call__(self, texts: list[str]) -> np.ndarray:
        """ids_bl int32: start, tokens, end, then zeros.

        A text that is too long is cut, its last token replaced by the end token.
        """
        ids_bl = np.zeros((len(texts), self.context), np.int32)
        for row, text in zip(ids_bl, texts, strict=True):
            ids = [START, *self._bpe.encode(clean(text))[: self.context - 2], END]
            row[: len(ids)] = ids
        return ids_bl


def clean(text: str) -> str:
    """Mend Unicode, undo HTML entities (twice, as CLIP does), collapse space, lower-case."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()
