"""A linear classifier on frozen features, its L2 penalty chosen on held-out training images.

    minimise_W,b   C sum_n CE(x_n W + b, y_n) + |W|^2 / 2

(scikit-learn's LogisticRegression). CLS, L2-normalised, then standardised with the mean and
deviation of the images learnt from. All values of C are fitted in one program, by full-batch L-BFGS
on all devices, on four fifths of the images; the best one on the last fifth is fitted again on all.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh

from uta_jax import mesh as meshes
from uta_jax.evals.features import Pooled, transform_in_words
from uta_jax.evals.setting import Setting
from uta_jax.evals.splits import labelled_pair

STRENGTHS = tuple(10.0**e for e in range(-5, 2))  # C of the equation
HEADLINE = ("top1", "C")
_STEPS = 1000  # of L-BFGS, at most
_TOLERANCE = 1e-5  # of the gradient of the mean loss, by its largest element
_HELD_OUT = 5  # every fifth


def run(params: dict, frozen: dict, cfg: Setting) -> dict[str, float]:
    """top1 (a share), C, n, n_fit."""
    del frozen
    fit, test, classes = labelled_pair(params["vision"], cfg)
    return probe(fit, test, len(classes), cfg.features.mesh) | {
        "n": len(test.label_n),
        "n_fit": len(fit.label_n),
    }


def protocol(cfg: Setting) -> dict[str, object]:
    """What has to be known beside the numbers."""
    return {
        "images": transform_in_words(cfg.spec),
        "feature": "CLS, normalised, standardised",
        "C": list(STRENGTHS),
        "chosen on": f"every {_HELD_OUT}th image of config.eval.fit, then fitted on all",
        "solver": f"L-BFGS, gradient below {_TOLERANCE:g} or {_STEPS} steps",
    }


def probe(fit: Pooled, test: Pooled, classes: int, mesh: Mesh) -> dict[str, float]:
    """The share of test images that are named right, and the C that was chosen."""
    feature_ne, label_n = standardised(fit.feature_ne, fit.feature_ne), fit.label_n
    held = np.arange(len(label_n)) % _HELD_OUT == _HELD_OUT - 1
    heads = fitted(feature_ne[~held], label_n[~held], STRENGTHS, classes, mesh)
    shares_s = accuracy(heads, feature_ne[held], label_n[held])
    best = STRENGTHS[int(np.argmax(shares_s))]
    head = fitted(feature_ne, label_n, (best,), classes, mesh)
    tested_ne = standardised(test.feature_ne, fit.feature_ne)
    return {"top1": float(accuracy(head, tested_ne, test.label_n)[0]), "C": best}


def standardised(feature_ne: np.ndarray, learnt_ne: np.ndarray) -> np.ndarray:
    """Features of length one, less the mean and over the deviation of those learnt from."""
    unit_ne, learnt_ne = (
        x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
        for x in (feature_ne, learnt_ne)
    )
    mean, deviation = learnt_ne.mean(axis=0), np.maximum(learnt_ne.std(axis=0), 1e-6)
    return (unit_ne - mean[None]) / deviation[None]


def fitted(
    feature_ne: np.ndarray, label_n: np.ndarray, strengths: tuple, classes: int, mesh: Mesh
) -> tuple[np.ndarray, np.ndarray]:
    """Weights [s, e, c] and biases [s, c], one head for each C."""
    count = len(label_n)
    rows = -(-count // mesh.size) * mesh.size
    weight_n = np.pad(np.full(count, 1 / count, np.float32), (0, rows - count))
    feature_ne = np.pad(feature_ne.astype(np.float32), ((0, rows - count), (0, 0)))
    placed = (feature_ne, np.pad(label_n, (0, rows - count)), weight_n)
    placed = jax.device_put(placed, meshes.batch_sharding(mesh))
    decay_s = np.asarray([1 / (c * count) for c in strengths], np.float32)
    heads = _fit(*placed, jax.device_put(decay_s, meshes.replicated(mesh)), classes)
    return meshes.fetch(heads)


@jax.jit(static_argnames="classes")
def _fit(feature_ne, label_n, weight_n, decay_s, classes: int) -> tuple[Array, Array]:
    fit_one = partial(_fit_one, feature_ne, label_n, weight_n, classes)
    # Not vmap: a small C converges in tens of steps, and the logits of seven heads may not fit.
    return jax.lax.map(fit_one, decay_s)


def _fit_one(feature_ne, label_n, weight_n, classes: int, decay) -> tuple[Array, Array]:
    """The head that minimises the mean loss + decay |W|^2 / 2."""

    def loss(head):
        logits_nc = jnp.matmul(feature_ne, head[0], precision="highest") + head[1][None]
        each_n = optax.losses.softmax_cross_entropy_with_integer_labels(logits_nc, label_n)
        return (each_n * weight_n).sum() + decay * (head[0] ** 2).sum() / 2

    optimizer = optax.lbfgs(memory_size=20)
    value_and_grad = optax.value_and_grad_from_state(loss)

    def goes_on(carry):
        _, state = carry
        steps, grad = optax.tree.get(state, "count"), optax.tree.get(state, "grad")
        largest = jnp.maximum(jnp.abs(grad[0]).max(), jnp.abs(grad[1]).max())
        return (steps == 0) | ((steps < _STEPS) & (largest > _TOLERANCE))

    def step(carry):
        head, state = carry
        value, grad = value_and_grad(head, state=state)
        updates, state = optimizer.update(grad, state, head, value=value, grad=grad, value_fn=loss)
        return optax.apply_updates(head, updates), state

    head = jnp.zeros((feature_ne.shape[1], classes)), jnp.zeros(classes)
    return jax.lax.while_loop(goes_on, step, (head, optimizer.init(head)))[0]


def accuracy(heads: tuple, feature_ne: np.ndarray, label_n: np.ndarray) -> np.ndarray:
    """The share of images that each head names right: [s]."""
    return np.asarray(
        [
            (np.argmax(feature_ne @ w + b[None], axis=1) == label_n).mean()
            for w, b in zip(*heads, strict=True)
        ]
    )
