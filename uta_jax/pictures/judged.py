"""Labelled images as student and teacher see them: dense, nearest neighbours, mistaken classes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from uta_jax import UserError
from uta_jax import mesh as meshes
from uta_jax.checkpoint import SavedRun
from uta_jax.config import reading_of
from uta_jax.data.decode import decode
from uta_jax.data.files import digest, spread
from uta_jax.data.sources import Source
from uta_jax.evals import dense
from uta_jax.evals.features import Features, Pooled
from uta_jax.evals.names import class_names
from uta_jax.evals.setting import Data, Setting
from uta_jax.evals.zeroshot import classifier
from uta_jax.objectives import normalize
from uta_jax.pictures import colour

IMAGES = 2000  # of a data set at most, evenly over it
_WINDOWS = 32  # of scenes at a time


class Part:
    """Some examples of a source, as a source."""

    def __init__(self, source: Source, indices: Sequence[int]):
        self._source, self._indices = source, list(indices)
        self.class_names, self.fields = source.class_names, source.fields

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict:
        return self._source[self._indices[index]]

    def fingerprint(self) -> str:
        """Of the whole source and the choice."""
        return digest(self._source.fingerprint(), str(self._indices))


@dataclass(frozen=True)
class Model:
    """A tower that is pictured, with what evaluators are given."""

    params: dict
    cfg: Setting

    @property
    def names_classes(self) -> bool:
        """Whether it shares a space with a text tower."""
        return self.cfg.spec.text is not None

    def pooled(self, source: Source) -> Pooled:
        """The feature of each image, of length one."""
        found = self.cfg.features.pooled(self.params["vision"], self.cfg.spec, source)
        return found._replace(feature_ne=np.asarray(normalize(found.feature_ne)))

    def predicted(self, images: Pooled, classes: Sequence[str]) -> np.ndarray:
        """The class that each image is nearest to, [n]."""
        weights_ce = np.asarray(classifier(self.params["text"], self.cfg, classes))
        return (images.feature_ne @ weights_ce.T).argmax(axis=1)


class Judged:
    """The labelled images of a run, and who looks at them: ``models``, teacher first."""

    def __init__(self, run: SavedRun, folder: Path):
        """``folder``: where image features are kept, as ``evaluate`` does.

        Raises:
          UserError: the run names no labelled images.
        """
        config, teacher = run.config, run.teacher
        if not config.eval.path:
            raise UserError("config.eval.path is empty in this run: it names no labelled images")
        mesh, reading = meshes.make_mesh(), reading_of(config.data)
        features = Features(config.eval.batch_size, mesh, reading, folder)
        self.few = Features(_WINDOWS, mesh, reading)
        self.data, teacher_spec = Data(config), teacher and run.task.teacher
        setting = Setting(config.eval, run.spec, teacher_spec, self.data, features)
        self.models = {}
        if teacher:
            of_teacher = replace(setting, spec=teacher.spec)
            self.models["teacher"] = Model(teacher.params, of_teacher)
        self.models["student"] = Model(run.clip, setting)

    @property
    def classnames_file(self) -> str:
        """As config.eval.classnames."""
        return self.models["student"].cfg.eval.classnames

    def images(self) -> Source:
        """The images that are tested, or a part of them."""
        source = self.data("test")
        count = len(source)
        return source if count <= IMAGES else Part(source, spread(IMAGES, count))

    def namers(self) -> dict[str, Model]:
        """The models that can name classes.

        Raises:
          UserError: the student cannot.
        """
        if not self.models["student"].names_classes:
            raise UserError("the student shares no space with a text tower: it names no classes")
        return {name: model for name, model in self.models.items() if model.names_classes}


class Scene(NamedTuple):
    """An image, and its classes by mask and by model; each a picture and the numbers seen in it."""

    image: np.ndarray
    layers: dict[str, tuple[np.ndarray, list[int]]]  # "truth", then the models


def scenes(judged: Judged, count: int) -> tuple[list[Scene], tuple[str, ...]]:
    """Dense zero-shot predictions at the pixels that count, and the names of the classes.

    Raises:
      UserError: no masks, or a student that cannot name classes.
    """
    source, namers = judged.data("masks"), judged.namers()
    chosen = Part(source, spread(count, len(source)))
    classes = class_names(source, judged.classnames_file)
    found: list[Scene] = []
    for name, model in namers.items():
        cfg = replace(model.cfg, data=lambda role: chosen, features=judged.few)
        for number, (scene, class_hw) in enumerate(dense.predictions(model.params, cfg)):
            if number == len(found):
                found.append(_bare(chosen[number], scene.mask))
            found[number].layers[name] = _layer(found[number].image, class_hw, scene.mask > 0)
    return found, classes


def _bare(example: dict, mask_hw: np.ndarray) -> Scene:
    image = np.asarray(decode(example["image"]).convert("RGB"))
    truth = _layer(image, mask_hw.astype(int) - 1, mask_hw > 0)
    return Scene(image, {"truth": truth})


def _layer(image: np.ndarray, class_hw: np.ndarray, shown_hw: np.ndarray):
    """The overlay, and its classes from the largest to the smallest."""
    numbers, counts = np.unique(class_hw[shown_hw], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return colour.overlay(image, class_hw, shown_hw), numbers[order].tolist()


class Strip(NamedTuple):
    """An image, and by model those nearest to it: pictures, labels (-1: none), cosines."""

    image: np.ndarray
    label: int
    nearest: dict[str, list[tuple[np.ndarray, int, float]]]


def strips(judged: Judged, count: int, neighbours: int) -> list[Strip]:
    """Nearest neighbours by the cosine of image features, among the tested images."""
    source, found = judged.images(), []
    for name, model in judged.models.items():
        images = model.pooled(source)
        for number, row in enumerate(spread(count, len(images.feature_ne))):
            if number == len(found):
                found.append(Strip(*_picture(source, images, row), {}))
            cosine_n = images.feature_ne @ images.feature_ne[row]
            cosine_n[row] = -np.inf
            near = np.argsort(-cosine_n, kind="stable")[: min(neighbours, len(cosine_n) - 1)]
            shown = [(*_picture(source, images, int(n)), float(cosine_n[n])) for n in near]
            found[number].nearest[name] = shown
    return found


def _picture(source: Source, images: Pooled, row: int) -> tuple[np.ndarray, int]:
    image = decode(source[int(images.index_n[row])]["image"]).convert("RGB")
    label = int(images.label_n[row]) if len(images.label_n) else -1
    return np.asarray(image), label


class Mistakes(NamedTuple):
    """Which of the hardest classes are taken for which, as counts of images."""

    classes: list[str]  # the hardest of the student, hardest first
    columns: list[str]  # these, what else they are often taken for, and the rest
    counts: np.ndarray  # [classes, columns], of the student
    shares: dict[str, list[float]]  # of each model: right, of each class
    images: int  # looked at


def mistakes(judged: Judged, count: int, others: int) -> Mistakes:
    """The ``count`` hardest classes, and at most ``others`` more that they are taken for.

    Raises:
      UserError: no class names, or a student that cannot name classes.
    """
    source, namers = judged.images(), judged.namers()
    names = class_names(source, judged.classnames_file)
    table = {name: confusion(model, source, names) for name, model in namers.items()}
    of_student = table["student"]
    total = of_student.sum(axis=1)
    rank = sorted(np.flatnonzero(total), key=lambda c: (of_student[c, c] / total[c], c))[:count]
    rest_c = of_student[rank].sum(axis=0)
    rest_c[rank] = 0
    more = [c for c in np.argsort(-rest_c, kind="stable")[:others] if rest_c[c]]
    shares = {
        name: [float(found[c, c] / found[c].sum()) for c in rank] for name, found in table.items()
    }
    columns = [*rank, *more]
    counts = of_student[np.ix_(rank, columns)]
    rest = total[rank] - counts.sum(axis=1)
    heads = [*(names[c] for c in columns), "others"]
    counts = np.column_stack([counts, rest])
    return Mistakes([names[c] for c in rank], heads, counts, shares, int(total.sum()))


def confusion(model: Model, source: Source, names: Sequence[str]) -> np.ndarray:
    """Images by true and predicted class [c, c]."""
    images = model.pooled(source)
    pair = images.label_n.astype(np.int64) * len(names) + model.predicted(images, names)
    return np.bincount(pair, minlength=len(names) ** 2).reshape(len(names), len(names))
