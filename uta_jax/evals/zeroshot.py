"""Zero-shot classification: images against the names of their classes.

Protocol (Radford et al. 2021, section 3.1; jihaonew/UTA, imagenet_zeroshot_eval.py): every class
name in every template, each text feature L2-normalised, averaged over the templates, normalised
again; the image feature is CLS; the class with the highest cosine wins.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from clu.metrics import Average
from jax import Array

from uta_jax import UserError
from uta_jax.data.loader import Reading, eval_batches
from uta_jax.data.tokenizer import Tokenizer
from uta_jax.mesh import replicated
from uta_jax.models.encode import check_ids, encode_images, encode_texts
from uta_jax.models.presets import ClipSpec
from uta_jax.objectives import normalize


def prompts(class_names: Iterable[str], templates: Iterable[str]) -> list[str]:
    """Every name in every template, the templates of one class adjacent."""
    return [template.format(name) for name in class_names for template in templates]


def class_weights(text_features_ce: Array, templates: int) -> Array:
    """Features of ``prompts`` [classes * templates, e] -> unit class weights [classes, e], fp32."""
    unit = normalize(text_features_ce).reshape(-1, templates, text_features_ce.shape[-1])
    return normalize(unit.mean(axis=1))


@jax.jit
def _correct(features_be: Array, weights_ce: Array, label_b: Array) -> tuple[Array, Array]:
    """Whether the right class is first, and among the first five."""
    logits_bc = jnp.matmul(normalize(features_be), weights_ce.T, precision="highest")
    _, best_bk = jax.lax.top_k(logits_bc, min(5, logits_bc.shape[1]))
    hit_bk = best_bk == label_b[:, None]
    return hit_bk[:, 0], hit_bk.any(axis=1)


def accuracy(weights_ce: Array, scored: Iterable[tuple[Array, dict]]) -> dict[str, float]:
    """Top-1, top-5 (shares) and n over pairs of features [b, e] and their batch (label, valid).

    Sums and counts are merged exactly, so the padding of the last batch weighs nothing.
    """
    top1, top5 = Average.empty(), Average.empty()
    for features_be, batch in scored:
        first, five = _correct(features_be, weights_ce, batch["label"])
        top1 = top1.merge(Average.from_model_output(first, batch["valid"]))
        top5 = top5.merge(Average.from_model_output(five, batch["valid"]))
    return {"top1": float(top1.compute()), "top5": float(top5.compute()), "n": int(top1.count)}


class ZeroShot:
    """Zero-shot classification of a labelled source, with a fixed protocol, for any CLIP.

    Called with a specification and parameters ``{"vision", "text"}`` it gives the figures of
    ``accuracy``.
    """

    def __init__(
        self,
        source,
        templates: Sequence[str],
        batch_size: int,
        sharding=None,
        reading: Reading = Reading(),
        watched: Callable[[Iterator[dict]], Iterator[dict]] = iter,
    ):
        """``watched`` wraps the batches of an evaluation, to leave it off."""
        if not source.class_names:
            raise UserError("zero-shot evaluation needs class names: the data set has no labels")
        self._source, self._sharding, self._reading = source, sharding, reading
        self._templates, self._batch_size = templates, batch_size
        self._watched = watched

    def __call__(self, spec: ClipSpec, params: dict) -> dict[str, float]:
        vision, text = (self._place(params[tower]) for tower in ("vision", "text"))
        ids_bl = check_ids(self.prompt_ids(spec.text.context), spec.text)
        starts = range(0, len(ids_bl), self._batch_size)
        size = self._batch_size
        features = [encode_texts(text, ids_bl[i : i + size], spec=spec.text) for i in starts]
        batches = self._watched(self.batches(spec))
        scored = ((encode_images(vision, b["image"], spec=spec), b) for b in batches)
        return self.score(jnp.concatenate(features), scored)

    def _place(self, params: dict) -> dict:
        """Once on the devices instead of with every batch."""
        return jax.device_put(params, self._sharding and replicated(self._sharding.mesh))

    def score(self, text_features: Array, scored: Iterable[tuple[Array, dict]]) -> dict[str, float]:
        """``accuracy`` from the features of ``prompt_ids``, by whatever model they were made."""
        return accuracy(class_weights(text_features, len(self._templates)), scored)

    def batches(self, spec: ClipSpec) -> Iterator[dict]:
        """The evaluation images as the model of ``spec`` takes them."""
        return eval_batches(
            self._source,
            batch_size=self._batch_size,
            image_size=spec.vision.image_size,
            resize=spec.resize,
            interpolation=spec.interpolation,
            resize_size=spec.resize_size,
            sharding=self._sharding,
            reading=self._reading,
        )

    def prompt_ids(self, context: int) -> np.ndarray:
        """Token ids [classes * templates, context] of all prompts."""
        return Tokenizer(context)(prompts(self._source.class_names, self._templates))
