"""``--config.runlocal=True``: the whole path of a recipe, small enough for a minute on a laptop.

Appended to any ``uta-jax train`` command, it wins over the recipe and over every other override:
what is large or not here is replaced, all else (objective, mask, optimizer, dtypes, remat, ...)
stays, so that a mistake shows before chips are rented.
"""

from ml_collections import ConfigDict

from uta_jax.config import default_config, leaves
from uta_jax.models import presets
from uta_jax.objectives import OBJECTIVES

STEPS = 8
BATCH = 16  # images
IMAGES = "80x80:{}"  # made-up ones: WIDTHxHEIGHT:EXAMPLES


def shrink(config: ConfigDict) -> dict[str, tuple]:
    """Shrink ``config`` in place; what was replaced, as dotted key -> (old, new)."""
    before = leaves(config)
    with config.unlocked():
        _shrink_models(config)
        _shrink_data(config)
        _shrink_schedule(config)
        config.mesh.update(default_config().mesh)  # whatever devices there are
    return {
        key: (before[key], value) for key, value in leaves(config).items() if before[key] != value
    }


def _shrink_models(config: ConfigDict) -> None:
    """A student of four thin layers with the recipe's traits; the little teacher in the package."""
    config.student.preset = _tiny(config.student.preset)
    config.student.image_size = config.teacher.image_size = 0  # 8 x 8 patches, as the teacher's
    config.mask.min_block = min(config.mask.min_block, 4)
    if OBJECTIVES[config.objective].needs_teacher:
        config.teacher.path = "asset:tiny_clip"


def _tiny(preset: str) -> str:
    """The little relative of a preset; an unknown name stays, to be refused as any other."""
    if preset not in presets.VIT:
        return preset
    return "uta_tiny" if presets.VIT[preset].rope_theta else "tiny_clip"


def _shrink_data(config: ConfigDict) -> None:
    data, scores = config.data, config.eval
    data.mixture = ()
    data.source, data.path, data.split = "synthetic", IMAGES.format(STEPS * BATCH), "train"
    data.batch_size = min(data.batch_size, BATCH)
    data.workers = min(data.workers, 2)
    if scores.path:
        scores.source, scores.path, scores.split = "synthetic", IMAGES.format(2 * BATCH), "val"
        scores.batch_size = min(scores.batch_size, BATCH)
        # These images have labels, neither captions nor masks, and names of their own.
        joint = OBJECTIVES[config.objective].joint_space
        scores.names, scores.classnames = ("zeroshot" if joint else "knn",), ""


def _shrink_schedule(config: ConfigDict) -> None:
    """A warm-up, two saves and two evaluations, if the recipe has them at all."""
    run, optim = config.train, config.optim
    run.steps, run.epochs = min(run.steps or STEPS, STEPS), 0.0
    half = max(run.steps // 2, 1)
    run.log_every, run.accumulate = 1, min(run.accumulate, 2)
    run.save_every, run.keep_every = min(run.save_every, half), 0
    run.eval_every = min(run.eval_every, half)
    if optim.warmup_steps or optim.warmup_epochs:
        optim.warmup_steps, optim.warmup_epochs = min(half, run.steps - 1), 0.0
