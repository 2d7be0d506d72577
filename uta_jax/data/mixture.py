"""Several sources as one, in given proportions."""

import bisect
import itertools
from collections.abc import Iterator, Sequence

from uta_jax import UserError
from uta_jax.data.files import checked_index, digest


class Mixture:
    """Sources mixed so that part p gives the share weights[p] / sum(weights) of all examples.

    An epoch is the shortest in which that holds and every example comes at least once. Some come
    more often: part p takes a block of consecutive indices and runs through its examples, in order,
    until the block is full. The loader's shuffle, which is global, mixes the blocks.

        10 and 40 examples, weights 1 and 1: an epoch of 80, those of the first part 4 times each.

    Examples keep the fields that all parts have; labels only where all parts have the same classes.
    """

    def __init__(self, sources: Sequence, weights: Sequence[float]):
        """Mix sources by positive weights, which need not add up to 1.

        Raises:
          UserError: no source, weights that are not positive or not as many as the sources.
        """
        if not sources or len(sources) != len(weights):
            raise UserError(f"mixture: {len(sources)} sources and {len(weights)} weights")
        if not all(0 < weight < float("inf") for weight in weights):
            raise UserError(f"mixture: weights {list(weights)}: must be positive numbers")
        self._sources, self._weights = tuple(sources), tuple(map(float, weights))
        total = sum(self._weights)
        shares = [weight / total for weight in self._weights]
        epoch = max(len(s) / share for s, share in zip(self._sources, shares, strict=True))
        counts = (round(epoch * share) for share in shares)
        self._counts = [max(n, len(s)) for n, s in zip(counts, self._sources, strict=True)]
        self._ends = list(itertools.accumulate(self._counts))
        names = {source.class_names for source in self._sources}
        self.class_names = names.pop() if len(names) == 1 else ()
        self.fields = self._common_fields(same_classes=bool(self.class_names))

    def _common_fields(self, same_classes: bool) -> tuple[str, ...]:
        fields = self._sources[0].fields
        common = (f for f in fields if all(f in source.fields for source in self._sources))
        return tuple(f for f in common if same_classes or f != "label")

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict:
        index = checked_index(index, len(self))
        number = bisect.bisect_right(self._ends, index)
        source = self._sources[number]
        example = source[(index - (self._ends[number] - self._counts[number])) % len(source)]
        kept = {name: example[name] for name in self.fields if name in example}
        return kept | {"key": f"{number}/{example['key']}"}

    def fingerprint(self) -> str:
        """Of the parts' fingerprints and the numbers of examples they give."""
        return digest("mixture", [s.fingerprint() for s in self._sources], self._counts)

    def once(self) -> "Mixture":
        """Every example of every part once: what there is to verify."""
        return Mixture(self._sources, [len(source) for source in self._sources])

    def describe(self) -> dict[str, str | int]:
        """What a change of the data is shown with: of part n with "n." before the name."""
        about: dict[str, str | int] = {"kind": "mixture", "examples": len(self)}
        parts = zip(self._sources, self._weights, self._counts, strict=True)
        for number, (source, weight, count) in enumerate(parts):
            of_part = source.describe() | {"weight": str(weight), "examples in an epoch": count}
            about |= {f"{number}.{name}": value for name, value in of_part.items()}
        return about

    def problems(self) -> Iterator[str]:
        """Those of the parts."""
        for number, source in enumerate(self._sources):
            yield from (f"part {number}: {problem}" for problem in source.problems())
