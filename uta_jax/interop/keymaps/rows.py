"""What the tables of this folder are made of: rows, rules, formats."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isqrt
from typing import NamedTuple

import numpy as np

from uta_jax.models.presets import ClipSpec


class Rule(NamedTuple):
    """A pair of inverse maps between one tensor of theirs and one of our parameters.

    ``load`` need only bring the values into our order: the shape follows from the specification.
    """

    load: Callable[[np.ndarray], np.ndarray]
    save: Callable[[np.ndarray], np.ndarray]


def _same(x: np.ndarray) -> np.ndarray:
    return x


def _transpose(x: np.ndarray) -> np.ndarray:
    return x.T


def _save_conv(x: np.ndarray) -> np.ndarray:
    side = isqrt(x.shape[0] // 3)
    return x.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)


RULES: dict[str, Rule] = {
    "same": Rule(_same, _same),
    # torch.nn.Linear weights are [out, in]; ours are [in, out], with the heads kept apart
    "linear": Rule(_transpose, _transpose),
    "to_heads": Rule(_transpose, lambda x: x.reshape(x.shape[0], -1).T),
    "from_heads": Rule(_transpose, lambda x: x.reshape(-1, x.shape[-1]).T),
    "head_bias": Rule(_same, lambda x: x.reshape(-1)),
    # convolution [d, 3, p, p] <-> [p * p * 3, d], flattened as (row, column, channel)
    "conv": Rule(lambda x: x.transpose(2, 3, 1, 0), _save_conv),
    # [1, n, d] <-> [n, d] and [1, 1, d] <-> [d]
    "squeeze": Rule(_same, lambda x: x[None]),
    "squeeze2": Rule(_same, lambda x: x[None, None]),
}


class Row(NamedTuple):
    """``theirs`` <-> ``ours``, by the rule of that name applied to each of ours.

    ``optional``: their model of an architecture without these parameters has no such tensor.
    """

    theirs: str
    ours: str | tuple[str, ...]
    rule: str = "same"
    optional: bool = False

    @property
    def paths(self) -> tuple[str, ...]:
        """Our paths, one or several."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours


class Extra(NamedTuple):
    """A key without a parameter: dropped when read, written by ``make(spec)`` where demanded.

    ``fixed``: its values follow from the architecture, so a file with others is of another one.
    """

    theirs: str
    make: Callable[[ClipSpec], np.ndarray] | None = None
    fixed: bool = False


@dataclass(frozen=True)
class Format:
    """One layout: its rows, its keys without parameters, and the architectures that it can hold."""

    title: str
    rows: tuple[Row, ...]
    extras: tuple[Extra, ...] = ()
    vision: Mapping[str, tuple] = field(default_factory=dict)  # VitSpec field -> values it can hold
    text: Mapping[str, tuple] = field(default_factory=dict)  # TextSpec field -> values it can hold
    # What no single field tells: short reasons why it cannot hold an architecture.
    reasons: Callable[[ClipSpec], list[str]] = lambda spec: []


def affine(
    theirs: str, ours: str, rule: str = "linear", bias: str = "same", optional: bool = False
) -> tuple[Row, Row]:
    """The two rows of a linear map."""
    return (
        Row(f"{theirs}.weight", f"{ours}/kernel", rule, optional),
        Row(f"{theirs}.bias", f"{ours}/bias", bias, optional),
    )


def norm(theirs: str, ours: str, optional: bool = False) -> tuple[Row, Row]:
    """The two rows of a LayerNorm."""
    return (
        Row(f"{theirs}.weight", f"{ours}/scale", optional=optional),
        Row(f"{theirs}.bias", f"{ours}/bias", optional=optional),
    )


def heads(theirs: str, ours: str, parts: str = "qkv") -> tuple[Row, Row]:
    """Weight and bias of a linear map that makes several of q, k and v at once."""
    return (
        Row(f"{theirs}weight", tuple(f"{ours}/{x}/kernel" for x in parts), "to_heads"),
        Row(f"{theirs}bias", tuple(f"{ours}/{x}/bias" for x in parts), "head_bias"),
    )
