"""The default configuration, and every check on one.

A recipe is ``default_config()`` with values replaced (``configs/*.py``). ``check`` looks at values
alone and costs nothing; ``make_recipe`` sees the teacher, the data set and the devices as well and
refuses what does not fit together (``tasks.py``: models and masks). Both run before anything is
read, compiled or written.
"""

import math
from contextlib import contextmanager
from importlib.util import find_spec

import jax
from ml_collections import ConfigDict

from uta_jax import UserError, masking
from uta_jax import mesh as meshes
from uta_jax.data import sources
from uta_jax.data.loader import Reading
from uta_jax.eval_keys import EVAL_RULES, add_eval
from uta_jax.models import presets
from uta_jax.models.presets import ClipSpec
from uta_jax.models.vit import REMAT
from uta_jax.objectives import OBJECTIVES, Task
from uta_jax.optimizer import AdamW
from uta_jax.processes import PLATFORMS
from uta_jax.step import Recipe
from uta_jax.tasks import make_task


def default_config() -> ConfigDict:
    """Every key there is, with its unit. Locked: a key that is not here is an error."""
    c = ConfigDict()
    c.objective = "uta"  # a key of objectives.OBJECTIVES
    c.platform = ""  # cpu, gpu or tpu: refuse to run on another; "": whatever is there
    c.seed = 0  # of the initial weights, the masks and the data order
    c.runlocal = False  # shrink all of it to a debug run: runlocal.py
    _add_method(c)
    _add_run(c)
    return c.lock()


def _add_method(c: ConfigDict) -> None:
    """What is trained, towards what."""
    c.student = ConfigDict()
    c.student.preset = "uta_b16"  # a key of presets.VIT (contrastive: of presets.CLIP)
    c.student.image_size = 0  # pixels; 0: the preset's own
    c.student.dtype = "bfloat16"  # of matrix products; parameters are always float32
    c.student.remat = "names"  # a key of vit.REMAT; none also keeps gathered shards of every layer

    c.teacher = ConfigDict()
    c.teacher.path = ""  # checkpoint directory or file, or asset:NAME
    c.teacher.image_size = 0  # pixels; 0: the size at which its grid is the student's
    c.teacher.dtype = "bfloat16"  # of its weights and products

    c.mask = ConfigDict()
    c.mask.kind = "random"  # one of masking.KINDS or WEIGHTED, as far as the objective can
    c.mask.ratio = 0.5  # share of the patches that is masked, in [0, 1)
    c.mask.min_block = 16  # patches; smallest rectangle of the block kinds

    c.loss = ConfigDict()
    c.loss.cls_weight = 1.0  # weight of the CLS token against 1 for each patch token


def _add_run(c: ConfigDict) -> None:
    """On which data, for how long, on which devices."""
    c.data = ConfigDict()
    c.data.source = "tfds"  # a key of sources.SOURCES
    c.data.path = ""  # directory
    c.data.split = "train"
    c.data.mixture = ()  # instead of the three above: (source, path, split, weight) of each part
    c.data.batch_size = 256  # global, over all devices
    c.data.crop_scale = (0.2, 1.0)  # share of the image's area that a training crop covers
    c.data.flip = True
    c.data.workers = 0  # processes that decode; 0: threads of this process
    c.data.threads = 2  # how many, where there are no workers
    c.data.timeout_s = 300.0  # seconds; a batch that takes longer ends the run
    c.data.max_bad_fraction = 1e-3  # of examples that cannot be used; 0: stop at the first
    c.data.allow_truncated = False  # use JPEGs that end early

    c.optim = ConfigDict()
    c.optim.lr = 1.5e-3  # peak
    c.optim.start_lr = 1e-6
    c.optim.end_lr = 1e-5
    c.optim.warmup_steps = 0
    c.optim.warmup_epochs = 0.0  # used where warmup_steps is 0
    c.optim.b1 = 0.9
    c.optim.b2 = 0.98
    c.optim.eps = 1e-6
    c.optim.weight_decay = 0.05
    c.optim.clip_norm = 3.0  # global gradient norm; 0: no clipping
    c.optim.ema_decay = 0.0  # 0: keep no average of the weights

    c.train = ConfigDict()
    c.train.steps = 0
    c.train.epochs = 0.0  # used where steps is 0
    c.train.accumulate = 1  # parts of a batch, computed one after the other: less memory
    c.train.log_every = 10  # steps
    c.train.eval_every = 0  # steps; 0: at the end only
    c.train.save_every = 500  # steps; the last step is always saved
    c.train.save_async = True  # beside the next steps; False: a kill loses save_every steps at most
    c.train.keep = 2  # newest checkpoints that are kept
    c.train.timeout_s = 1800.0  # seconds; a longer update, evaluation or save ends the run
    c.train.panels = 0  # crops pictured on the boards, at the start and with evaluations; 0: none
    c.train.wandb = (
        ""  # project at Weights & Biases that figures and panels go to as well; "": none
    )
    c.train.keep_every = 0  # steps; saved multiples of it are kept as well; 0: none
    c.train.resume = "auto"  # must: refuse to start anew; never: refuse to go on
    c.train.max_bad_steps = 3  # updates in a row that are not finite: the run stops
    c.train.compile_cache = "~/.cache/uta_jax"  # where compilations are kept; "": nowhere

    add_eval(c)

    c.mesh = ConfigDict()
    c.mesh.data = -1  # copies of the parameters; -1: as many as the others leave devices for
    c.mesh.fsdp = 1  # parts that parameters are kept in
    c.mesh.tensor = 1  # parts that each layer is computed in: of its heads, of its hidden units
    c.mesh.dcn_data = 0  # the part of mesh.data between slices; 0: as many as there are

    c.processes = ConfigDict()  # where there are several
    c.processes.start_s = 300.0  # seconds to wait for all of them at the start
    c.processes.heartbeat_s = 20.0  # seconds of silence after which one counts as lost
    c.processes.shutdown_s = 60.0  # seconds between the end of the first and of the last


def _one_of(table) -> tuple:
    return (lambda v: v in table), "one of " + ", ".join(table)


def _between(low: float, high: float, text: str) -> tuple:
    """``low <= v < high``; NaN fails every comparison."""
    return (lambda v: low <= v < high), text


def _is_scale(value: tuple) -> bool:
    numbers = all(isinstance(v, int | float) for v in value)
    return numbers and len(value) == 2 and 0 < value[0] <= value[1] <= 1


def _is_mixture(value: tuple) -> bool:
    """() or (source, path, split, weight > 0) each."""
    return all(
        isinstance(part, tuple)
        and [isinstance(v, str) for v in part] == [True, True, True, False]
        and part[0] in sources.SOURCES
        and isinstance(part[3], int | float)
        and 0 < part[3] < math.inf
        for part in value
    )


def _is_place(value: str) -> bool:
    return not value or value.startswith(("/", "~", "gs://"))


_POSITIVE = (lambda v: 0 < v < math.inf), "a finite number > 0"
_NOT_NEGATIVE = _between(0, math.inf, "a finite number >= 0")
_COUNT = _between(1, 2**31, "an integer >= 1")
_COUNT_OR_0 = _between(0, 2**31, "an integer >= 0")
_DTYPE = _one_of(("float32", "bfloat16"))

# Key -> (test, what is allowed).
_RULES = {
    "objective": _one_of(OBJECTIVES),
    "platform": _one_of(PLATFORMS),
    "seed": _COUNT_OR_0,
    "student.preset": _one_of(presets.VIT),
    "student.image_size": _COUNT_OR_0,
    "student.dtype": _DTYPE,
    "student.remat": _one_of(REMAT),
    "teacher.image_size": _COUNT_OR_0,
    "teacher.dtype": _DTYPE,
    "mask.kind": _one_of(masking.KINDS + masking.WEIGHTED),
    "mask.ratio": _between(0, 1, "a share in [0, 1): 0 keeps every patch"),
    "mask.min_block": _COUNT,
    "loss.cls_weight": _NOT_NEGATIVE,
    "data.source": _one_of(sources.SOURCES),
    "data.batch_size": _COUNT,
    "data.crop_scale": (_is_scale, "(low, high) with 0 < low <= high <= 1"),
    "data.mixture": (_is_mixture, "(source, path, split, weight > 0) of each part, or ()"),
    "data.workers": _COUNT_OR_0,
    "data.threads": _COUNT,
    "data.timeout_s": _POSITIVE,
    "data.max_bad_fraction": ((lambda v: 0 <= v <= 1), "a share in [0, 1]: 1 never stops"),
    "optim.lr": _POSITIVE,
    "optim.start_lr": _NOT_NEGATIVE,
    "optim.end_lr": _NOT_NEGATIVE,
    "optim.warmup_steps": _COUNT_OR_0,
    "optim.warmup_epochs": _NOT_NEGATIVE,
    "optim.b1": _between(0, 1, "in [0, 1)"),
    "optim.b2": _between(0, 1, "in [0, 1)"),
    "optim.eps": _POSITIVE,
    "optim.weight_decay": _NOT_NEGATIVE,
    "optim.clip_norm": _NOT_NEGATIVE,
    "optim.ema_decay": _between(0, 1, "in [0, 1)"),
    "train.steps": _COUNT_OR_0,
    "train.epochs": _NOT_NEGATIVE,
    "train.accumulate": _COUNT,
    "train.log_every": _COUNT,
    "train.eval_every": _COUNT_OR_0,
    "train.save_every": _COUNT,
    "train.keep": _COUNT,
    "train.timeout_s": _POSITIVE,
    "processes.start_s": _POSITIVE,
    "processes.heartbeat_s": _between(1, math.inf, "a number of seconds >= 1"),
    "processes.shutdown_s": _POSITIVE,
    "train.panels": _COUNT_OR_0,
    "train.wandb": (
        (lambda v: not v or find_spec("wandb") is not None),
        '"", or a project once the package is installed: pip install wandb',
    ),
    "train.keep_every": _COUNT_OR_0,
    "train.resume": _one_of(("auto", "must", "never")),
    "train.max_bad_steps": _COUNT,
    "train.compile_cache": (_is_place, 'a path from / or ~ on, or ""'),
    **EVAL_RULES,
}


def check(config: ConfigDict) -> None:
    """Raise UserError for the first value that is impossible on its own."""
    values = leaves(config)
    for key, (test, allowed) in _RULES.items():
        value = values[key]
        if not test(value):
            raise UserError(f"config.{key}={value} is not allowed: it must be {allowed}")
    if not config.train.steps and not config.train.epochs:
        raise UserError("config.train.steps=0 trains nothing: set it, or config.train.epochs, > 0")
    if not (config.data.path or config.data.mixture or config.data.source == "synthetic"):
        raise UserError("config.data.path is empty: name the directory of the training images")
    if OBJECTIVES[config.objective].needs_teacher and not config.teacher.path:
        raise UserError(
            f"config.teacher.path is empty, but objective {config.objective!r} needs a teacher: "
            "name a CLIP checkpoint, or asset:tiny_clip"
        )


def open_data(data: ConfigDict) -> sources.Source:
    """The training examples that the section ``data`` names."""
    if data.mixture:
        return sources.open_mixture(data.mixture)
    return sources.open_source(data.source, data.path, data.split)


def reading_of(data: ConfigDict) -> Reading:
    """How the section ``data`` has examples read, for training and for evaluation."""
    return Reading(data.workers, data.threads, data.timeout_s, data.allow_truncated)


@contextmanager
def blame(key: str):
    """Let a mistake found in what ``key`` points to name the key as well."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{key}: {error}") from error


def make_recipe(
    config: ConfigDict, teacher: ClipSpec | None, examples: int, devices: int = 0
) -> Recipe:
    """The static recipe of a run.

    ``teacher``: the specification of the checkpoint at ``config.teacher.path`` (its own input
    size), or None; ``examples``: length of the training set; ``devices``: how many it runs on (0:
    those present). Raises UserError for what does not fit
    together.
    """
    check(config)
    devices = devices or jax.device_count()
    m = config.mesh
    data, fsdp, tensor = meshes.sizes(m.data, m.fsdp, m.tensor, devices)
    _check_divides("data.batch_size", config.data.batch_size, data * fsdp, tensor)
    _check_accumulates(config, data * fsdp)
    if config.eval.path:
        _check_divides("eval.batch_size", config.eval.batch_size, data * fsdp, tensor)
    if config.data.batch_size > examples:
        raise UserError(
            f"config.data.batch_size={config.data.batch_size} is more than the {examples} training "
            "examples there are: lower it"
        )
    o, run = config.optim, config.train
    for key in ("start_lr", "end_lr"):
        if o[key] > o.lr:
            raise UserError(
                f"config.optim.{key}={o[key]} is above the peak config.optim.lr={o.lr}: lower it"
            )
    steps = run.steps or _steps(run.epochs, config, examples)
    if not steps:
        raise UserError(
            f"config.train.epochs={run.epochs} of {examples} examples is less than half a batch: "
            "raise it, or set config.train.steps"
        )
    warmup = o.warmup_steps or _steps(o.warmup_epochs, config, examples)
    if warmup >= steps:
        key = "steps" if o.warmup_steps else "epochs"
        raise UserError(
            f"config.optim.warmup_{key}={o[f'warmup_{key}']} makes {warmup} steps of warm-up, but "
            f"the run has {steps}: lower it, or train for longer"
        )
    optim = AdamW(
        o.lr, steps, warmup, o.start_lr, o.end_lr, o.b1, o.b2, o.eps, o.weight_decay, o.clip_norm
    )
    task = make_task(config, teacher)
    _check_parts(tensor, task)
    return Recipe(task, optim, o.ema_decay, config.seed, run.accumulate)


def _check_divides(key: str, size: int, parts: int, tensor: int) -> None:
    """``parts`` of ``tensor`` devices each compute different images."""
    if size % parts:
        what = f"groups of mesh.tensor={tensor} devices" if tensor > 1 else "devices"
        raise UserError(
            f"config.{key}={size} does not divide over the {parts} {what}: "
            f"choose a multiple of {parts}"
        )


def _check_accumulates(config: ConfigDict, devices: int) -> None:
    """Each part of the batch must divide over what computes different images, as the whole does."""
    parts, size = config.train.accumulate, config.data.batch_size
    if parts > 1 and not OBJECTIVES[config.objective].by_example:
        raise UserError(
            f"config.train.accumulate={parts} changes objective {config.objective!r}, which "
            "compares every image of a batch with every text: use 1"
        )
    if size % (parts * devices):
        raise UserError(
            f"config.train.accumulate={parts} does not divide the {size // devices} images that "
            f"config.data.batch_size={size} leaves each device: choose a divisor, or a batch that "
            f"is a multiple of {parts * devices}"
        )


def _check_parts(tensor: int, task: Task) -> None:
    """Every tower's heads and hidden units must fall into ``tensor`` equal parts."""
    teacher = task.teacher.vision if task.teacher else None
    towers = {"student": task.student, "text tower": task.text, "teacher": teacher}
    for name, tower in towers.items():
        if tower and (most := math.gcd(tower.heads, tower.mlp_hidden)) % tensor:
            raise UserError(
                f"config.mesh.tensor={tensor} does not divide the {tower.heads} heads and "
                f"{tower.mlp_hidden} hidden units of the {name}: choose a divisor of {most}"
            )


def _steps(epochs: float, config: ConfigDict, examples: int) -> int:
    return round(epochs * examples / config.data.batch_size)


def leaves(config: ConfigDict, prefix: str = "") -> dict[str, object]:
    """Dotted key -> value, over all sections."""
    flat = {}
    for key, value in config.items():
        section = isinstance(value, ConfigDict)
        flat |= leaves(value, f"{prefix}{key}.") if section else {prefix + key: value}
    return flat
