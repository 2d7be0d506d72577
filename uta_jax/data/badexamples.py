"""The count of examples that could not be used, their names, and when there are too many."""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from uta_jax import UserError
from uta_jax.data.examples import ATTEMPTS, Bad

FEW = 10_000  # examples before which a fraction says little
NAMED = 5  # keys in a message


class BadExamples:
    """Counts bad examples, appends them to a file, and stops the run when they are too many.

    Too many: more than `max_fraction` of the examples tried. Until `FEW` of them are, the run stops
    only once that is certain to be exceeded at `FEW`; a wholly broken set so stops at once.

    Args:
      max_fraction: 0 stops at the first, 1 never.
      path: of the JSON lines {position, index, key, reason}; None: counted alone.
    """

    def __init__(self, max_fraction: float, path: Path | None = None):
        self.count = 0
        self._max, self._path, self._used, self._first = max_fraction, path, 0, []

    def resume(self, count: int, used: int, position: int) -> None:
        """Go on after `used` good examples and `count` bad ones, all before `position`.

        What the file holds from `position` on is cut off: it is about to be found again.
        """
        self.count, self._used = count, used
        if self._path is None or not self._path.exists():
            return
        rows = []
        with suppress(ValueError):  # what was being written when the run was killed
            rows += map(json.loads, self._path.read_text("utf-8").splitlines())
        kept = [row for row in rows if row["position"] < position]
        self._first = [row["key"] for row in kept[:NAMED]]
        new = self._path.with_name(self._path.name + ".tmp")
        new.write_text("".join(json.dumps(row) + "\n" for row in kept), "utf-8")
        new.replace(self._path)

    def add(self, used: int, bad: Sequence[Bad]) -> None:
        """Count a batch of `used` examples on the way to which `bad` ones were met.

        Raises:
          UserError: too many; naming the fraction, the threshold and the first keys.
        """
        self._used += used
        if not bad:
            return
        self.count += len(bad)
        self._first += [one.key for one in bad[: NAMED - len(self._first)]]
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(one._asdict()) + "\n" for one in bad)
        tried = self._used + self.count
        if self.count > self._max * max(tried, FEW):
            raise UserError(self._too_many(tried, bad[-1]))

    def _too_many(self, tried: int, last: Bad) -> str:
        of = f"of {FEW} that" if tried < FEW else "that"
        return (
            f"data: {self.count} of the first {tried} examples ({self.count / tried:.2%}) cannot "
            f"be used, more than the {self._max:.2%} {of} data.max_bad_fraction={self._max:g} "
            f"allows: {named(self._first, self.count)}; the last one: {last.reason}"
            + (f"; all are in {self._path}" if self._path else "")
        )


def named(keys: Sequence[str], count: int) -> str:
    """The first keys of `count`, for a message."""
    return ", ".join(map(repr, keys[:NAMED])) + (", ..." if count > NAMED else "")


def hopeless(bad: Sequence[Bad]) -> UserError:
    """For a position at which nothing usable was found."""
    keys = named([one.key for one in bad], len(bad))
    return UserError(
        f"data: {ATTEMPTS} examples in a row cannot be used: {keys}; the last one: {bad[-1].reason}"
    )
