"""``uta-jax data verify``: read and decode every example once, and say what is there."""

import hashlib
import io
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from uta_jax import UserError
from uta_jax.data import BadExample, printable
from uta_jax.data.examples import checked_label
from uta_jax.data.files import is_dir, listed, local_if_file_url, output
from uta_jax.data.mixture import Mixture
from uta_jax.data.sources import Source
from uta_jax.data.transforms import eval_transform
from uta_jax.data.workers import Crew

BATCH = 64  # examples that are given out at a time
SHOWN = 20  # lines about bad examples and about duplicates; --json has them all


class Found(NamedTuple):
    """What one example turned out to be."""

    key: str
    reason: str = ""  # why it cannot be used; "": it can
    bytes: int = 0
    format: str = ""  # by content, whatever the name says
    mode: str = ""  # of the pixels, as Pillow calls it
    size: tuple[int, int] = (0, 0)  # (width, height)
    image_hash: bytes = b""  # of the encoded image
    hash: str = ""  # of everything in the example


@dataclass(frozen=True)
class Inspection:
    """Reads an example and decodes its image in full."""

    source: Source
    allow_truncated: bool = False

    def __call__(self, position: int, index: int, _, note: Callable[[str], None]) -> Found:
        found = Found(f"example {index}")
        try:
            example = self.source[index]
            note(example["key"])
            found = _hashed(example)
            found = _header(found, example["image"])
            if "label" in example:
                checked_label(example["label"], len(self.source.class_names))
            eval_transform(example["image"], 32, allow_truncated=self.allow_truncated)
            return found
        except BadExample as error:
            return found._replace(reason=str(error))


def _hashed(example: dict) -> Found:
    image = example["image"]
    digest = hashlib.sha256(image)
    image_hash = digest.digest()[:16]
    rest = {name: example[name] for name in ("text", "label") if name in example}
    digest.update(json.dumps(rest, sort_keys=True).encode() + example.get("mask", b""))
    return Found(example["key"], bytes=len(image), image_hash=image_hash, hash=digest.hexdigest())


def _header(found: Found, image: bytes) -> Found:
    try:
        with Image.open(io.BytesIO(image)) as header:
            return found._replace(format=header.format, mode=header.mode, size=header.size)
    except Exception:  # not for the header to judge
        return found


def verify(
    source: Source,
    *,
    workers: int = 0,
    timeout_s: float = 300.0,
    allow_truncated: bool = False,
    json_file: str | Path | None = None,
    hashes: str | Path | None = None,
    write_hashes: str | Path | None = None,
) -> dict:
    """Inspect every example, print a report and return it; report["good"]: nothing is bad.

    Of a mixture, every example is inspected once, however often it comes in an epoch.

    Args:
      workers: processes; 0 for two threads.
      timeout_s, allow_truncated: as in loader.Reading.
      hashes: a file written by `write_hashes` before; what differs from it is bad.

    Raises:
      UserError: an empty source, or a file that cannot be read or written.
    """
    about = {"source": source.describe(), "fingerprint": source.fingerprint()}
    source = source.once() if isinstance(source, Mixture) else source
    if len(source) == 0:
        raise UserError("data: the source holds no examples")
    if workers < 0:
        raise UserError(f"--workers={workers}: must be 0 (threads) or more")
    tally = _Tally(len(source))
    with ExitStack() as stack:
        json_out = stack.enter_context(output(json_file)) if json_file else None
        expected = _read_hashes(hashes, stack) if hashes else None
        out = stack.enter_context(output(write_hashes)) if write_hashes else None
        crew = Crew(
            Inspection(source, allow_truncated),
            (BATCH, 1),
            workers=workers,
            threads=2,
            timeout_s=timeout_s,
        )
        stack.callback(crew.close)
        stack.callback(crew.stop)  # this one first
        start = time.perf_counter()
        for index, found in enumerate(_inspected(crew, len(source))):
            if expected is not None:
                found = _compared(found, next(expected, None), hashes)
            if out:
                out.write(f"{found.hash or '-'}  {printable(found.key)}\n")
            tally.add(index, found)
        if expected is not None and next(expected, None) is not None:
            tally.bad.append((str(hashes), f"has more than the {len(source)} examples there are"))
        report = about | tally.report(source, time.perf_counter() - start)
        if json_out:
            json_out.write(json.dumps(report, indent=2) + "\n")
    print(table(report))
    return report


def _inspected(crew: Crew, examples: int) -> Iterator[Found]:
    """Every example in order, with a progress bar."""
    starts = range(0, examples, BATCH)
    plan = ([(i, i) for i in range(n, min(n + BATCH, examples))] for n in starts)
    with tqdm(total=examples, unit="image", desc="verify") as bar:
        for _, found in crew.run(plan):
            yield from found
            bar.update(len(found))


class _Tally:
    """Counts what is found; of each example 16 bytes are kept."""

    def __init__(self, examples: int):
        self.bad: list[tuple[str, str]] = []  # (key, reason)
        self._hashes = np.zeros(examples, "V16")
        self._formats, self._modes = Counter(), Counter()
        self._bytes = 0
        self._low, self._high = (2**31, 2**31), (0, 0)

    def add(self, index: int, found: Found) -> None:
        self._hashes[index] = found.image_hash.ljust(16, b"\0")
        self._bytes += found.bytes
        if found.reason:
            self.bad.append((found.key, found.reason))
            return
        self._formats[found.format] += 1
        self._modes[found.mode] += 1
        self._low = tuple(map(min, self._low, found.size))
        self._high = tuple(map(max, self._high, found.size))

    def report(self, source: Source, seconds: float) -> dict:
        """With what the source finds wrong with itself (an index that does not fit)."""
        problems = list(source.problems())
        examples, good = len(self._hashes), sum(self._formats.values())
        pairs = list(_duplicates(self._hashes))
        return {
            "examples": examples,
            "bytes": self._bytes,
            "formats": dict(self._formats.most_common()),
            "modes": dict(self._modes.most_common()),
            "smallest": list(self._low) if good else None,
            "largest": list(self._high) if good else None,
            "duplicates": len(pairs),
            "duplicate_keys": [[source[n]["key"] for n in pair] for pair in pairs[:SHOWN]],
            "bad": [{"key": key, "reason": reason} for key, reason in self.bad],
            "problems": problems,
            "seconds": seconds,
            "images_per_s": examples / seconds,
            "good": not self.bad and not problems,
        }


def _duplicates(hashes: np.ndarray) -> Iterator[tuple[int, int]]:
    """(first, later) index of images with the same bytes."""
    words = hashes.view("u8").reshape(-1, 2)
    order = np.lexsort((np.arange(len(words)), words[:, 1], words[:, 0]))
    same = (words[order][1:] == words[order][:-1]).all(axis=1) & words[order][1:].any(axis=1)
    first = None
    for n in np.flatnonzero(same).tolist():
        first = n if first is None or not same[n - 1] else first
        yield int(order[first]), int(order[n + 1])


def _read_hashes(path: str | Path, stack: ExitStack) -> Iterator[tuple[str, str]]:
    """(hash, key) of every line."""
    try:
        file = stack.enter_context(open(path, encoding="utf-8", errors="replace"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None

    def lines() -> Iterator[tuple[str, str]]:
        for number, line in enumerate(file, 1):
            digest, _, key = line.rstrip("\n").partition("  ")
            if not key:
                raise UserError(f"{path}: line {number} is not `HASH  KEY`")
            yield digest, key

    return lines()


def _compared(found: Found, line: tuple[str, str] | None, path) -> Found:
    """Bad, too, where it is not what the file of hashes says."""
    if found.reason:
        return found
    if line is None:
        return found._replace(reason=f"is not in {path}")
    digest, key = line
    if key != printable(found.key):
        return found._replace(reason=f"stands where {path} has {key!r}")
    return found if digest == found.hash else found._replace(reason=f"differs from {path}")


def table(report: dict) -> str:
    """The report as lines of text."""
    size = "{} x {}".format
    lines = [
        f"{report['examples']} examples, {report['bytes'] / 1e6:.1f} MB, "
        f"{report['images_per_s']:.0f} images/s",
        "formats    " + _shares(report["formats"]),
        "modes      " + _shares(report["modes"]),
    ]
    if report["smallest"]:
        lines.append(f"sizes      {size(*report['smallest'])} to {size(*report['largest'])} pixels")
    lines.append(f"duplicates {report['duplicates']}")
    lines += [f"  {again!r} is {first!r}" for first, again in report["duplicate_keys"]]
    lines.append(f"bad        {len(report['bad'])}")
    lines += [f"  {bad['key']!r}: {bad['reason']}" for bad in report["bad"][:SHOWN]]
    if len(report["bad"]) > SHOWN:
        lines.append(f"  and {len(report['bad']) - SHOWN} more (all of them: --json=FILE)")
    return "\n".join(lines + [f"problem    {line}" for line in report["problems"]])


def _shares(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or "none"


def guess_kind(path: str | Path) -> str:
    """What kind of source lies at a path, judged by names alone: a key of SOURCES."""
    path = local_if_file_url(path).rstrip("/") or "/"
    names = listed(path) if is_dir(path) else [path.rsplit("/", 1)[-1]]
    if "dataset_info.json" in names:
        return "tfds"
    for kind, ending in _ENDINGS.items():
        if any(re.search(ending, name) for name in names):
            return kind
    return "folder"


_ENDINGS = {
    "tar": r"\.tar$",
    "parquet": r"\.parquet$",
    "arrayrecord": r"\.(array_?record|arrayrecords?)(-\d+-of-\d+)?$",
}
