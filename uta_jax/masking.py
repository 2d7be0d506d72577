"""Which patches the student sees: ``sample`` -> sorted indices of exactly k kept patches per image.

``random``          every k-subset equally likely.
``block``           BEiT's rectangles are *dropped* (Bao et al. 2021; baaivision/EVA,
                    masking_generator.py).
``reversed_block``  the same rectangles are *kept*. UTA names a reversed block-wise mask and
                    publishes no algorithm: this reading is ours.
``attention``       patches are drawn one after the other, each with a chance in proportion to its
                    weight among those that are left (MaskAlign: what the teacher's CLS attends to).

The rectangles of BEiT stop when ten tries in a row fail, which leaves the count short in about a
third of the draws. A compiled step needs it exact, so the rest is topped up with the cells that
touch the rectangles on most sides, ties broken at random; drawn rectangles are never trimmed, since
one that would overshoot is refused.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

KINDS = ("random", "block", "reversed_block")  # of chance alone
WEIGHTED = ("attention",)  # of weights as well, where the objective has them

_TRIES = 10  # consecutive failures after which no further rectangle is sought
_ROUNDS = 100  # tries in all: more than any grid in use needs (16 x 16, half masked: about 15)
_LOG_ASPECT = math.log(1 / 0.3)


@dataclass(frozen=True)
class Mask:
    """How patches are chosen; static in a compiled step."""

    kind: str = "random"  # one of KINDS or WEIGHTED
    keep: int = 1  # patches kept of each image
    min_block: int = 16  # smallest area, in patches, that a rectangle is drawn with


class Share(NamedTuple):
    """In the place of a key: every ``parts``-th row of what it draws for so many times the rows."""

    key: Array
    number: Array  # int32 scalar, in [0, parts): of the first row
    parts: int


def _drawn(draw: Callable, rng: Array | Share, rows: int, columns: int) -> Array:
    """``draw`` (of ``jax.random``): fp32 [rows, columns]."""
    if not isinstance(rng, Share):
        return draw(rng, (rows, columns))
    all_rpc = draw(rng.key, (rows * rng.parts, columns)).reshape(rows, rng.parts, columns)
    return jax.lax.dynamic_index_in_dim(all_rpc, rng.number, axis=1, keepdims=False)


def keep_count(tokens: int, ratio: float) -> int:
    """Patches kept of ``tokens`` when the share ``ratio`` is dropped."""
    return round(tokens * (1.0 - ratio))


def sample(
    rng: Array | Share, batch: int, grid: int, mask: Mask, weight_bn: Array | None = None
) -> Array:
    """Draw ``keep_bk``: int32 [b, mask.keep], sorted, distinct, within [0, grid * grid).

    ``weight_bn``: not negative; of the kinds in ``WEIGHTED`` alone.
    """
    tokens, places = grid * grid, 4 * _ROUNDS
    if mask.kind == "random":
        score_bn = _drawn(jax.random.uniform, rng, batch, tokens)
    elif mask.kind == "attention":
        # The k highest of these are k draws without replacement (Kool et al. 2019, section 3).
        score_bn = jnp.log(weight_bn) + _drawn(jax.random.gumbel, rng, batch, tokens)
    else:
        area = mask.keep if mask.kind == "reversed_block" else tokens - mask.keep
        # One draw for both purposes: every one adds to the time of compilation.
        u_bu = _drawn(jax.random.uniform, rng, batch, places + tokens)
        covered_bgg = rectangles(u_bu[:, :places], grid, area, mask.min_block)
        score_bn = _top_up(covered_bgg, u_bu[:, places:]).reshape(batch, tokens)
        score_bn = -score_bn if mask.kind == "block" else score_bn
    # With top_k every device would gather the scores of the whole batch.
    keep_bk = jnp.argsort(-score_bn, axis=-1)[:, : mask.keep]
    return jnp.sort(keep_bk.astype(jnp.int32), axis=-1)


def complement(keep_bk: Array, tokens: int) -> tuple[Array, Array]:
    """The patches not in ``keep_bk``: as bool [b, tokens], and as indices, int32 [b, tokens - k].

    Sorted.
    """
    dropped_bn = (keep_bk[:, :, None] != jnp.arange(tokens)[None, None]).all(axis=1)
    order_bn = jnp.argsort(~dropped_bn, axis=1, stable=True)
    return dropped_bn, order_bn[:, : tokens - keep_bk.shape[1]].astype(jnp.int32)


def _top_up(covered_bgg: Array, tie_bn: Array) -> Array:
    """[b, g, g] scores: covered cells first, then those that most of them touch, then chance."""
    padded = jnp.pad(covered_bgg.astype(jnp.float32), ((0, 0), (1, 1), (1, 1)))
    rows, columns = padded[:, :, 1:-1], padded[:, 1:-1]
    sides = rows[:, :-2] + rows[:, 2:] + columns[:, :, :-2] + columns[:, :, 2:]
    # Covered: 5 at least; else the number of covered neighbours, 0 to 4, and less than 1 by chance.
    return 5.0 * covered_bgg + sides + tie_bn.reshape(sides.shape)


def rectangles(u_bu: Array, grid: int, area: int, min_block: int) -> Array:
    """BEiT's draw from uniform numbers [b, 4 * rounds]: bool [b, g, g], up to ``area`` covered."""

    def draw(u_u: Array) -> Array:
        (covered, *_), _ = jax.lax.scan(
            lambda carry, u_4: (_try_rectangle(u_4, *carry, min_block), None),
            (jnp.zeros((grid, grid), bool), jnp.int32(area), jnp.int32(0)),
            u_u.reshape(-1, 4),
        )
        return covered

    return jax.vmap(draw)(u_bu)


def _try_rectangle(u_4, covered, missing, failures, min_block):
    """Cover one more rectangle if it adds between 1 and the missing number of cells."""
    grid = covered.shape[0]
    u_area, u_aspect, u_top, u_left = u_4
    size = min_block + u_area * (missing - min_block)
    aspect = jnp.exp((2 * u_aspect - 1) * _LOG_ASPECT)
    height, width = jnp.round(jnp.sqrt(size * aspect)), jnp.round(jnp.sqrt(size / aspect))
    top, left = jnp.floor(u_top * (grid - height + 1)), jnp.floor(u_left * (grid - width + 1))
    cell = jnp.arange(grid, dtype=jnp.float32)
    rows, columns = (cell >= top) & (cell < top + height), (cell >= left) & (cell < left + width)
    grown = covered | (rows[:, None] & columns[None, :])
    gain = (grown & ~covered).sum()
    fits = (height < grid) & (width < grid) & (gain > 0) & (gain <= missing) & (failures < _TRIES)
    # Once ten tries have failed, ``fits`` stays false and the count only grows.
    covered, missing = jnp.where(fits, grown, covered), jnp.where(fits, missing - gain, missing)
    return covered, missing, jnp.where(fits, 0, failures + 1)
