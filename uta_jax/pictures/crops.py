"""Training crops, what the student saw of them, and its patch tokens beside its teacher's."""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from uta_jax import config as configs
from uta_jax import masking
from uta_jax.data.loader import TrainLoader
from uta_jax.objectives import (
    OBJECTIVES,
    Task,
    by_attention,
    cosine,
    normalize,
    run_teacher,
    student_input,
)
from uta_jax.pictures import colour
from uta_jax.step import step_key


class Row(NamedTuple):
    """One kind of picture, of every crop."""

    title: str
    pictures: list[np.ndarray]  # uint8 [s, s, 3]; maps have one pixel a patch
    is_map: bool


class Crops(NamedTuple):
    """The rows of pictures, and what has to be known to read them."""

    rows: list[Row]
    note: str


def training_crops(config, task: Task, count: int) -> np.ndarray:
    """The first ``count`` images of the run's first batch, uint8 [b, s, s, 3].

    Read anew by every process; an epoch of fewer images gives those it has.
    """
    data, source = config.data, configs.open_data(config.data)
    loader = TrainLoader(
        source,
        batch_size=min(count, len(source)),
        seed=config.seed,
        image_size=task.student.image_size,
        crop_scale=data.crop_scale,
        flip=data.flip,
        reading=replace(configs.reading_of(data), workers=0),  # for a few images
        process_index=0,
        process_count=1,
    )
    try:
        return next(loader)["image"]
    finally:
        loader.close()


@partial(jax.jit, static_argnames=("task", "batch_size", "seed"))
def look(
    vision: dict, frozen: dict, image_bhwc: Array, *, task: Task, batch_size: int, seed: int
) -> tuple[Array, Array | None, Array | None]:
    """(student's patch tokens [b, n, e], teacher's, patches kept in the run's first update [b, k]).

    Both see whole images; tokens are projected and of length one, in fp32. ``vision``: the
    student's tower; ``frozen``: the teacher, {} without one, and then there is None in its place;
    None for the patches of an objective that masks none. ``batch_size``: of the run.
    """
    student_bne = task.vit().apply({"params": vision}, student_input(image_bhwc, task))
    teacher_bne = weight_bn = keep_bk = None
    if frozen:
        found = run_teacher(frozen, image_bhwc, task, attention=by_attention(task))
        variables = {"params": frozen["vision"]}
        teacher_bne = task.teacher_vit().apply(variables, found.tokens_bkd, method="project")
        teacher_bne = normalize(teacher_bne[:, 1:])
        if by_attention(task):
            # A row of the mask depends on its own image alone: any others will do for the rest.
            row_b = np.arange(batch_size) % len(image_bhwc)
            weight_bn = found.cls_attention_bk[row_b, 1:]
    if OBJECTIVES[task.objective].masks:
        key = step_key(seed, 0)
        keep_bk = masking.sample(key, batch_size, task.student.grid, task.mask, weight_bn)
        keep_bk = keep_bk[: len(image_bhwc)]
    return normalize(student_bne[:, 1:]), teacher_bne, keep_bk


def draw(image_bhwc: np.ndarray, tokens: tuple, task: Task) -> Crops:
    """The pictures from crops and from what ``look`` found, on the host."""
    student_bne, teacher_bne, keep_bk = tokens
    grid, comparable = task.student.grid, OBJECTIVES[task.objective].joint_space
    rows, notes = [Row("training crop", list(image_bhwc), False)], []
    if keep_bk is not None:
        shown_bgg = _shown(keep_bk, grid)
        masked = map(colour.seen, image_bhwc, shown_bgg)
        rows.append(Row("what the student saw", list(masked), False))
    if teacher_bne is not None and comparable:
        agreement_bn = np.asarray(cosine(student_bne, teacher_bne))
        low = float(agreement_bn.min())
        rows.append(_map("cosine with the teacher", colour.scale(agreement_bn, low, 1.0), grid))
        notes.append(f"Cosine with the teacher from {low:.2f} (dark) to 1 (light).")
    return Crops(
        rows + _features(student_bne, teacher_bne, comparable, notes, grid), " ".join(notes)
    )


def _features(student_bne, teacher_bne, comparable: bool, notes: list[str], grid: int) -> list[Row]:
    """Patch features by colour; in one colour space where they live in one space."""
    basis, rows = None, []
    for title, found in (("teacher's features", teacher_bne), ("student's features", student_bne)):
        if found is None:
            continue
        if basis is None or not comparable:
            basis = colour.Principal(found.reshape(-1, found.shape[-1]))
        rows.append(_map(title, basis.colours(found), grid))
    about = "Features by colour: three principal components"
    if len(rows) == 2:
        about += " of the teacher's, for both" if comparable else " of each model's own"
    notes.append(f"{about}; both models see whole crops." if len(rows) == 2 else f"{about}.")
    return rows


def _map(title: str, colour_bn3: np.ndarray, grid: int) -> Row:
    return Row(title, list(colour_bn3.reshape(-1, grid, grid, 3)), True)


def _shown(keep_bk: np.ndarray, grid: int) -> np.ndarray:
    shown_bn = np.zeros((len(keep_bk), grid * grid), bool)
    np.put_along_axis(shown_bn, keep_bk, True, axis=1)
    return shown_bn.reshape(-1, grid, grid)


def pictured(run, count: int) -> Crops:
    """Of a run read from its folder (``checkpoint.SavedRun``).

    Raises:
      UserError: its training images cannot be read.
    """
    image_bhwc = training_crops(run.config, run.task, count)
    frozen = {"vision": run.teacher.params["vision"]} if run.teacher else {}
    found = look(
        run.student["vision"], frozen, jnp.asarray(image_bhwc), task=run.task,
        batch_size=run.config.data.batch_size, seed=run.config.seed,
    )  # fmt: skip
    return draw(image_bhwc, jax.device_get(found), run.task)
