"""The tokenizer is equal to open_clip's."""

import random
import unicodedata

import emoji
import numpy as np
import pytest

from uta_jax.data.tokenizer import Tokenizer

STRINGS = [
    "", "   ", "a dog", "A Dog's  bone", "it’s “quoted” — text…",
    "don't we'll I'm they've you'd I'D",
    "&lt;b&gt; &amp;amp; &nbsp;x", "&amp;lt;br&amp;gt;", "caf&eacute; &#128512; &hearts;",
    "🍎 a 👨‍👩‍👧 family 🇩🇪", "你好世界", "日本語テキスト", "नमस्ते", "مرحبا بالعالم", "한국어",
    "Ünïcödé straße İstanbul", "schÃ¶n mojibake â€™", "1234 12.5% $5", "_under_score_ #tag @user",
    "<start_of_text>", "a <END_of_text> b", "<|startoftext|>", "x" * 500, "word " * 200, "🍎" * 90,
    "\x00\x01 control", "a\tb\nc\r\n", "ﬁ ligature ½ ² Ⅷ", "K Å", "a\u200bb\u00adc\u0301",
    "ΑΣ ΟΔΟΣ",
    "\ufeffbom \u2028 x \xa0 \u3000", "!!!???...", "'s''s", "a photo of a {}.", "\\n \\u0041",
]  # fmt: skip


def assert_equal(texts, context):
    from open_clip.tokenizer import tokenize

    ours, theirs = Tokenizer(context)(texts), tokenize(texts, context).numpy()
    assert ours.dtype == np.int32 and ours.shape == (len(texts), context)
    different = [text for text, a, b in zip(texts, ours, theirs, strict=True) if (a != b).any()]
    assert different == []


@pytest.mark.parametrize("context", [77, 32, 8])
def test_chosen_strings(context):
    assert_equal(STRINGS, context)


def test_random_strings():
    rng = random.Random(0)
    pieces = [chr(code) for code in range(32, 127)] + list(
        "’“”…—éüßñçı½²Ⅷ你好日नमस्ते🍎\u200d👩🇩\u0301\xa0\t\n"
    )
    pieces += [" "] * 25 + ["'s", "'LL", "&amp;", "&quot;", "n't", "the ", "photo"]
    assert_equal(["".join(rng.choices(pieces, k=rng.randint(1, 60))) for _ in range(1500)], 77)


def test_every_emoji():
    assert_equal(list(emoji.EMOJI_DATA), 16)


def test_every_character_of_the_wheels_unicode_but_the_documented_ones():
    """The documented ones: U+0345 and U+017F, and so the ligature of U+017F and t."""
    tables = unicodedata if unicodedata.unidata_version <= "15.0.0" else unicodedata.ucd_3_2_0
    characters = [chr(code) for code in range(1, 0x31350) if not 0xD800 <= code < 0xE000]
    known = [c for c in characters if tables.category(c) not in ("Cn", "Co")]
    known = [c for c in known if c not in "\u0345\u017f\ufb05"]
    texts = [
        " ".join(f"a{c}b '{c}" for c in known[start : start + 4])
        for start in range(0, len(known), 4)
    ]
    assert_equal(texts, 77)
