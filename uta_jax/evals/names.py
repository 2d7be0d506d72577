"""Class names and templates: the data set's own, those of a file, and those in the package."""

import importlib.resources
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from uta_jax import UserError
from uta_jax.data.sources import Source

IMAGENET, OPENAI = "imagenet", "openai"  # their sources: assets/imagenet/README.md
_SHIPPED = {IMAGENET: "classnames.txt", OPENAI: "templates.txt"}


def class_names(source: Source, file: str = "") -> tuple[str, ...]:
    """The names of the classes of a labelled source: its own, or the lines of a file.

    ``file``: a path, or "imagenet" for the 1,000 names in the package.

    Raises:
      UserError: no labels, no names, or a file whose names do not fit or come twice.
    """
    if "label" not in source.fields:
        raise UserError("config.eval.path: the data have no labels; choose a labelled data set")
    if not file:
        if not source.class_names:
            raise UserError(
                "config.eval.path: the data have labels but no class names: name them in a file, "
                "one a line, and give config.eval.classnames=FILE"
            )
        return source.class_names
    names = _lines(file, "config.eval.classnames")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice and file != IMAGENET:  # OpenAI's list has "missile" and "sunglasses" twice
        raise UserError(
            f"config.eval.classnames={file}: {len(twice)} names come twice, the first: "
            f"{twice[0]!r}; tell the classes apart"
        )
    if source.class_names and len(source.class_names) != len(names):
        raise UserError(
            f"config.eval.classnames={file}: {len(names)} names, but the data have "
            f"{len(source.class_names)} classes: one line for each, in the order of the labels"
        )
    return names


def templates(texts: Sequence[str], file: str = "") -> tuple[str, ...]:
    """``texts``, or the lines of a file, each with one {} (or {c}) where the name goes.

    ``file``: a path, or "openai" for the 80 templates in the package.
    """
    if not file:
        return tuple(texts)
    lines = tuple(line.replace("{c}", "{}") for line in _lines(file, "config.eval.templates_file"))
    for number, line in enumerate(lines, 1):
        if line.count("{}") != 1 or line.count("{") != 1 or line.count("}") != 1:
            raise UserError(
                f"config.eval.templates_file={file}: line {number} is {line!r}: write one {{}} "
                "where the class name goes"
            )
    return lines


def check_labels(label_n: np.ndarray, names: Sequence[str], needs_all: str = "") -> list[str]:
    """The names of the classes without an example.

    ``needs_all``: what has to have an example of every class.

    Raises:
      UserError: a label beyond the names, or a class without an example where all need one.
    """
    counts = np.bincount(label_n, minlength=len(names))
    if len(counts) > len(names):
        raise UserError(
            f"config.eval.classnames: {len(names)} names, but there is a label {len(counts) - 1}: "
            "one line for each class, in the order of the labels"
        )
    missing = [name for name, count in zip(names, counts, strict=True) if not count]
    if missing and needs_all:
        raise UserError(
            f"{needs_all}: {len(missing)} of {len(names)} classes have no example among its "
            f"{len(label_n)}, the first: {missing[0]!r}; give it more examples, or a data set of "
            "fewer classes"
        )
    return missing


def _lines(file: str, key: str) -> tuple[str, ...]:
    try:
        if file in _SHIPPED:
            folder = importlib.resources.files("uta_jax") / "assets" / "imagenet"
            text = (folder / _SHIPPED[file]).read_text("utf-8")
        else:
            text = Path(file).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"{key}={file}: cannot be read ({reason})") from None
    lines = tuple(line.strip() for line in text.splitlines())
    if not lines:
        raise UserError(f"{key}={file}: the file is empty; write one a line")
    if "" in lines:
        raise UserError(f"{key}={file}: line {lines.index('') + 1} is empty; remove it")
    return lines
