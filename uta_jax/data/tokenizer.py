"""Text to token ids: CLIP's byte pairs, and the tokenizer files of SigLIP models; no PyTorch."""

import html
import string
from collections.abc import Callable
from pathlib import Path

import ftfy
import numpy as np

from uta_jax import UserError

START, END = 49406, 49407  # <start_of_text>, <end_of_text> in the vocabulary of CLIP
CLIP_NAME = "clip"  # the tokenizer that is built in
CLIP_VOCAB = END + 1


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
    return " ".join(_mend(text).split()).lower()


def _mend(text: str) -> str:
    return html.unescape(html.unescape(ftfy.fix_text(text)))


# SigLIP: a vocabulary in a file beside the weights


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _clean_siglip(text: str) -> str:
    """As transformers' SiglipTokenizer: ASCII punctuation goes, the first word is marked."""
    text = ("▁" + text.replace("▁", " ")).lower().translate(_NO_PUNCTUATION)
    return " ".join(text.split())


def _clean_open_clip(text: str) -> str:
    """As open_clip's "canonicalize"."""
    text = _mend(text).strip().replace("_", " ").translate(_NO_PUNCTUATION)
    return " ".join(text.lower().split())


def _clean_lower(text: str) -> str:
    """As transformers' Siglip2Tokenizer: character by character, no final sigma."""
    return "".join(map(str.lower, text))


CLEANING: dict[str, Callable[[str], str]] = {
    "siglip": _clean_siglip,
    "lower": _clean_lower,
    "open_clip": _clean_open_clip,
}


class FileTokenizer:
    """Tokens of a model's own vocabulary, the end token, then padding, as SigLIP was trained.

    ``tokenizer.json`` (package tokenizers) and ``*.model`` (package sentencepiece) are read. What
    the file does not say follows from its end token: "</s>" (SigLIP; padded with itself, without
    punctuation), "<eos>" (SigLIP 2, Gemma's vocabulary; padded with "<pad>", lower-cased).

    Equal to transformers' SiglipTokenizer for SigLIP's ``spiece.model``, to its Siglip2Tokenizer
    for a Gemma ``tokenizer.json``, to open_clip's for a T5 ``tokenizer.json``, or any with
    ``cleaning="open_clip"``; but a text that spells a special token out is text here.
    """

    def __init__(self, path: Path, context: int, cleaning: str = ""):
        """context: length of every row. cleaning: a key of CLEANING; "": by the file."""
        if not path.is_file():
            raise UserError(f"{path}: no such file: it holds the model's tokenizer")
        is_json = path.suffix == ".json"
        self.context = context
        self._encode, ids = _open_json(path) if is_json else _open_sentencepiece(path)
        self.end_token = next((token for token in ("<eos>", "</s>") if token in ids), None)
        if self.end_token is None:
            raise UserError(f"{path}: its vocabulary has no end token (</s> or <eos>)")
        gemma = self.end_token == "<eos>"
        self.pad_token = "<pad>" if gemma and "<pad>" in ids else self.end_token
        self._end, self._pad = ids[self.end_token], ids[self.pad_token]
        by_file = "lower" if gemma else "open_clip" if is_json else "siglip"
        self.cleaning = cleaning or by_file
        if self.cleaning not in CLEANING:
            raise UserError(f"{path}: cleaning={cleaning!r} must be one of: {', '.join(CLEANING)}")

    def __call__(self, texts: list[str]) -> np.ndarray:
        """ids_bl int32; of a text that is too long, the first tokens and the end token."""
        ids_bl = np.full((len(texts), self.context), self._pad, np.int32)
        clean_text = CLEANING[self.cleaning]
        for row, text in zip(ids_bl, texts, strict=True):
            ids = [*self._encode(clean_text(text))[: self.context - 1], self._end]
            row[: len(ids)] = ids
        return ids_bl


def open_tokenizer(
    name: str, folder: Path | None, context: int, cleaning: str = ""
) -> Tokenizer | FileTokenizer:
    """The tokenizer that a specification names: "clip", or a file's plain name in ``folder``.

    ``cleaning``: as FileTokenizer. Raises UserError where the file is missing, unreadable, or lies
    elsewhere than in ``folder``, or its package is not installed.
    """
    if name == CLIP_NAME:
        return Tokenizer(context)
    if folder is None or not name or Path(name).name != name:
        raise UserError(f"tokenizer {name!r} must be {CLIP_NAME!r} or a file beside the weights")
    return FileTokenizer(Path(folder) / name, context, cleaning)


_Encode = Callable[[str], list[int]]


def _open_json(path: Path) -> tuple[_Encode, dict[str, int]]:
    try:
        import tokenizers
    except ImportError:
        raise UserError(f"{path}: reading it needs `pip install tokenizers`") from None
    try:
        model = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # it raises nothing narrower
        raise UserError(f"{path}: not a readable tokenizer file ({error})") from None
    model.no_padding()
    model.no_truncation()
    return lambda text: model.encode(text, add_special_tokens=False).ids, model.get_vocab()


def _open_sentencepiece(path: Path) -> tuple[_Encode, dict[str, int]]:
    try:
        import sentencepiece
    except ImportError:
        raise UserError(f"{path}: reading it needs `pip install sentencepiece`") from None
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise UserError(f"{path}: not a readable sentencepiece model ({error})") from None
    ids = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
    if "<eos>" in ids:
        return model.encode, ids
    # As transformers: the model strips a leading mark of a word unless something is before it.
    before = model.id_to_piece(model.unk_id())
    skipped = len(model.encode(before))
    return lambda text: model.encode(before + text)[skipped:], ids
