"""Zero-shot classification: images against the names of their classes.

Protocol (Radford et al. 2021, section 3.1; jihaonew/UTA, imagenet_zeroshot_eval.py): every class
name in every template, each text feature L2-normalised, averaged over the templates, normalised
again; the image feature is CLS; the class with the highest cosine wins.
"""

import sys
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from uta_jax.data.tokenizer import Tokenizer
from uta_jax.evals import names as named
from uta_jax.evals.features import Pooled, transform_in_words
from uta_jax.evals.setting import Setting
from uta_jax.objectives import normalize

_ROWS = 4096  # images at a time against all classes


def run(params: dict, frozen: dict, cfg: Setting) -> dict[str, float]:
    """top1, top5, mean_class (shares), n, and ``class/NUMBER NAME``: the share of each class."""
    del frozen
    source = cfg.data("test")
    classes = named.class_names(source, cfg.eval.classnames)
    weights_ce = classifier(params["text"], cfg, classes)
    return scores(weights_ce, cfg.features.pooled(params["vision"], cfg.spec, source), classes)


def protocol(cfg: Setting) -> dict[str, object]:
    """What has to be known beside the numbers."""
    return {
        "images": transform_in_words(cfg.spec),
        "classes": cfg.eval.classnames or "the data's own",
        "templates": len(all_templates(cfg)),
        "ensemble": "normalise, mean over templates, normalise",
    }


def all_templates(cfg: Setting) -> tuple[str, ...]:
    """The templates that the configuration names."""
    return named.templates(cfg.eval.templates, cfg.eval.templates_file)


def classifier(text: dict, cfg: Setting, classes: Sequence[str]) -> Array:
    """Unit class weights [classes, e]."""
    templates = all_templates(cfg)
    feature_me = cfg.features.texts(text, cfg.spec, prompts(classes, templates))
    return class_weights(feature_me, len(templates))


def prompts(class_names: Iterable[str], templates: Iterable[str]) -> list[str]:
    """Every name in every template, the templates of one class adjacent."""
    return [template.format(name) for name in class_names for template in templates]


def prompt_ids(class_names: Sequence[str], templates: Sequence[str], context: int) -> np.ndarray:
    """Token ids [classes * templates, context] of ``prompts``."""
    return Tokenizer(context)(prompts(class_names, templates))


def class_weights(text_features_ce: Array, templates: int) -> Array:
    """Features of ``prompts`` [classes * templates, e] -> unit class weights [classes, e], fp32."""
    unit = normalize(text_features_ce).reshape(-1, templates, text_features_ce.shape[-1])
    return normalize(unit.mean(axis=1))


@jax.jit
def _best(feature_be: Array, weights_ce: Array) -> Array:
    """The five nearest classes, best first [b, 5]; all where there are fewer."""
    logits_bc = jnp.matmul(normalize(feature_be), weights_ce.T, precision="highest")
    return jax.lax.top_k(logits_bc, min(5, logits_bc.shape[1]))[1]


def scores(weights_ce: Array, images: Pooled, classes: Sequence[str]) -> dict[str, float]:
    """The figures of ``run`` from unit class weights and image features."""
    missing = named.check_labels(images.label_n, classes)
    if missing:
        print(
            f"zeroshot: {len(missing)} of {len(classes)} classes have no example (the first: "
            f"{missing[0]!r}); the mean over classes leaves them out",
            file=sys.stderr,
        )
    starts = range(0, len(images.feature_ne), _ROWS)
    best = [_best(images.feature_ne[i : i + _ROWS], weights_ce) for i in starts]
    hit_nk = np.concatenate(best) == images.label_n[:, None]
    per_class = {
        f"class/{number} {name}": float(hit_nk[images.label_n == number, 0].mean())
        for number, name in enumerate(classes)
        if (images.label_n == number).any()
    }
    return {
        "top1": float(hit_nk[:, 0].mean()),
        "top5": float(hit_nk.any(axis=1).mean()),
        "mean_class": float(np.mean(list(per_class.values()))),
        "n": len(hit_nk),
    } | per_class
