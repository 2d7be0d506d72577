"""Image-text retrieval: recall at 1, 5 and 10, both ways, with any number of captions an image.

Protocol (LAION CLIP_benchmark, zeroshot_retrieval.py): cosine of CLS and caption; a query is found
if any of its partners is among the k nearest; the mean over queries. Every line of an example's
text is a caption. Of equal cosines the earlier one counts as nearer.
"""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from uta_jax import UserError
from uta_jax.data import BadExample
from uta_jax.data.sources import Source
from uta_jax.evals.features import transform_in_words
from uta_jax.evals.setting import Setting, needs
from uta_jax.objectives import normalize

KS = (1, 5, 10)
HEADLINE = tuple(f"{way}/{k}" for way in ("image_to_text", "text_to_image") for k in KS)
_ROWS = 1024  # queries at a time against everything
_READERS = 16  # threads that wait for files


def run(params: dict, frozen: dict, cfg: Setting) -> dict[str, float]:
    """``image_to_text/K`` and ``text_to_image/K`` (shares), n_images, n_texts."""
    del frozen
    source = cfg.data("captions")
    needs(source, "text", "config.eval.captions")
    images = cfg.features.pooled(params["vision"], cfg.spec, source)
    texts, owner_m = captions(source, images.index_n)
    text_me = cfg.features.texts(params["text"], cfg.spec, texts)
    return recalls(images.feature_ne, text_me, owner_m)


def protocol(cfg: Setting) -> dict[str, object]:
    """What has to be known beside the numbers."""
    return {"images": transform_in_words(cfg.spec), "captions": "every line of the text"}


def captions(source: Source, index_n: np.ndarray) -> tuple[list[str], np.ndarray]:
    """All captions of the examples, and which row of ``index_n`` [m] each belongs to.

    Raises:
      UserError: an example without one.
    """
    with ThreadPoolExecutor(_READERS) as pool:
        found = list(pool.map(lambda index: _captions(source, int(index)), index_n))
    without = [key for key, lines in found if not lines]
    if without:
        raise UserError(
            f"config.eval.captions: {len(without)} of {len(found)} examples have no caption (the "
            f"first: {without[0]}); give them one, or leave them out of the data set"
        )
    owner_m = np.repeat(np.arange(len(found), dtype=np.int32), [len(lines) for _, lines in found])
    return [line for _, lines in found for line in lines], owner_m


def _captions(source: Source, index: int) -> tuple[str, list[str]]:
    try:
        example = source[index]
    except BadExample:
        return f"example {index}", []
    lines = example.get("text", "").splitlines()
    return example["key"], [line for line in lines if line.strip()]


def recalls(image_ne: np.ndarray, text_me: np.ndarray, owner_m: np.ndarray) -> dict[str, float]:
    """The figures of ``run`` from features and the row of the image of every text."""
    own_n = np.arange(len(image_ne), dtype=np.int32)
    ways = {
        "image_to_text": _found(image_ne, own_n, text_me, owner_m),
        "text_to_image": _found(text_me, owner_m, image_ne, own_n),
    }
    figures = {f"{way}/{k}": x for way, found in ways.items() for k, x in found.items()}
    return figures | {"n_images": len(image_ne), "n_texts": len(text_me)}


def _found(query_qe, query_q: np.ndarray, key_ke, key_k: np.ndarray) -> dict[int, float]:
    """Share of the queries that have a key of their own number among the k nearest, for each k."""
    key_ke, ks = normalize(key_ke), [k for k in KS if k <= len(key_k)]
    hits = []
    for start in range(0, len(query_q), _ROWS):
        nearest_qk = np.asarray(_nearest(query_qe[start : start + _ROWS], key_ke, max(ks)))
        hits.append(key_k[nearest_qk] == query_q[start : start + _ROWS, None])
    hit_qk = np.concatenate(hits)
    return {k: float(hit_qk[:, :k].any(axis=1).mean()) for k in ks}


@jax.jit(static_argnames="k")
def _nearest(query_qe: Array, key_ke: Array, k: int) -> Array:
    """The k unit keys nearest to each query, nearest first [q, k]."""
    cosine_qk = jnp.matmul(normalize(query_qe), key_ke.T, precision="highest")
    return jax.lax.top_k(cosine_qk, k)[1]
