"""What an evaluator is given beside parameters: the data, the protocol's choices, the features."""

from collections.abc import Callable
from dataclasses import dataclass

from uta_jax import UserError
from uta_jax.config import blame, open_data
from uta_jax.data.sources import Source, open_source
from uta_jax.evals.features import Features
from uta_jax.models.presets import ClipSpec


class Data:
    """The data sets that a configuration names for its evaluators, opened when asked for."""

    def __init__(self, config):
        """``config``: of a run; its sections ``eval`` and ``data`` are read."""
        self._config, self._open = config, {}

    def __call__(self, role: str) -> Source:
        """``test``: labelled images; ``captions``, ``masks``: images with those; ``fit``: labelled
        images that kNN and probes learn from.

        Raises:
          UserError: what cannot be opened, naming the key.
        """
        if role not in self._open:
            self._open[role] = self._opened(role)
        return self._open[role]

    def _opened(self, role: str) -> Source:
        ev = self._config.eval
        if role == "test":
            with blame("config.eval"):
                return open_source(ev.source, ev.path, ev.split)
        own, rest = ev[role], self._config.data if role == "fit" else ev
        with blame(f"config.eval.{role}"):
            if role == "fit" and not (own.path or own.source or own.split):
                return open_data(rest)
            names = ("source", "path", "split")
            return open_source(*(own[name] or rest[name] for name in names))


def needs(source: Source, field: str, key: str) -> None:
    """Raise UserError, naming ``key``, where the examples of ``source`` lack ``field``."""
    if field not in source.fields:
        what = {"text": "captions", "mask": "masks", "label": "labels"}[field]
        raise UserError(
            f"{key}: the examples have no {what}; name a data set (and split) with them"
        )


@dataclass(frozen=True)
class Setting:
    """Everything that stays the same while parameters change."""

    eval: object  # the section ``eval`` of a configuration
    spec: ClipSpec  # of the model that is measured
    teacher: ClipSpec | None  # of ``frozen``
    data: Data
    features: Features


@dataclass(frozen=True)
class Evaluator:
    """One file of this package, as the table in ``evals`` lists it."""

    run: Callable[[dict, dict, Setting], dict[str, float]]
    protocol: Callable[[Setting], dict[str, object]]  # what has to be known beside the numbers
    headline: tuple[str, ...]  # the figures that are shown; counts are whole numbers, else shares
    of_teacher: bool = True  # False: says nothing of a teacher alone
    roles: tuple[str, ...] = ("test",)  # the data that it reads
    joint_space: bool = False  # only of models that share a space with a text tower
