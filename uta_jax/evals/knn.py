"""Nearest neighbours: how well the features of labelled images name the class of others.

Protocol (DINO, eval_knn.py; DINOv2, eval/knn.py): CLS, L2-normalised; each of the k nearest
training images votes for its class with exp(cosine / 0.07); the class with most votes wins.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from uta_jax.evals.features import Pooled, transform_in_words
from uta_jax.evals.setting import Setting
from uta_jax.evals.splits import labelled_pair
from uta_jax.objectives import normalize

KS = (10, 20, 100, 200)
TEMPERATURE = 0.07
HEADLINE = tuple(f"top1/{k}" for k in KS)
_ROWS = 256  # images at a time against all training images


def run(params: dict, frozen: dict, cfg: Setting) -> dict[str, float]:
    """``top1/K`` (shares) for each k that there are training images for, n, n_fit."""
    del frozen
    fit, test, classes = labelled_pair(params["vision"], cfg)
    found = accuracy(fit, test, len(classes))
    return {f"top1/{k}": share for k, share in found.items()} | {
        "n": len(test.label_n),
        "n_fit": len(fit.label_n),
    }


def protocol(cfg: Setting) -> dict[str, object]:
    """What has to be known beside the numbers."""
    vote = f"exp(cosine / {TEMPERATURE})"
    return {"images": transform_in_words(cfg.spec), "feature": "CLS, normalised", "vote": vote}


def accuracy(fit: Pooled, test: Pooled, classes: int) -> dict[int, float]:
    """Share of the test images whose class wins the vote, for each k."""
    ks = tuple(k for k in KS if k <= len(fit.label_n)) or (len(fit.label_n),)
    fit_ne, fit_n, hits = normalize(fit.feature_ne), jnp.asarray(fit.label_n), []
    for start in range(0, len(test.label_n), _ROWS):
        feature_be = test.feature_ne[start : start + _ROWS]
        winner_bk = np.asarray(_winners(feature_be, fit_ne, fit_n, ks, classes))
        hits.append(winner_bk == test.label_n[start : start + _ROWS, None])
    return dict(zip(ks, np.concatenate(hits).mean(axis=0).tolist(), strict=True))


@jax.jit(static_argnames=("ks", "classes"))
def _winners(feature_be: Array, fit_ne: Array, fit_n: Array, ks: tuple, classes: int) -> Array:
    """The class with most votes among the nearest, for each k: [b, len(ks)]."""
    cosine_bn = jnp.matmul(normalize(feature_be), fit_ne.T, precision="highest")
    cosine_bk, nearest_bk = jax.lax.top_k(cosine_bn, max(ks))
    vote_bk, class_bk = jnp.exp(cosine_bk / TEMPERATURE), fit_n[nearest_bk]
    row_b1 = jnp.arange(len(feature_be))[:, None]
    votes, winners, start = jnp.zeros((len(feature_be), classes)), [], 0
    for k in ks:  # the votes of a larger k are those of the smaller one and some more
        votes = votes.at[row_b1, class_bk[:, start:k]].add(vote_bk[:, start:k])
        winners.append(votes.argmax(axis=1))
        start = k
    return jnp.stack(winners, axis=1)
