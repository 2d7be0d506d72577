"""What a configuration trains towards what: towers, masks and loss that fit together, as a Task."""

from dataclasses import replace

from ml_collections import ConfigDict

from uta_jax import UserError, masking
from uta_jax.models import presets
from uta_jax.models.presets import ClipSpec
from uta_jax.objectives import OBJECTIVES, Task


def make_task(config: ConfigDict, teacher: ClipSpec | None) -> Task:
    """The architecture and loss of a run.

    ``teacher``: the specification of its teacher at its own input size, or None. Raises UserError
    for what does not fit together.
    """
    student = _student_spec(config, teacher)
    text = None
    if OBJECTIVES[config.objective].needs_text:
        if config.student.preset not in presets.CLIP:
            raise UserError(
                f"config.student.preset={config.student.preset} has no text tower, which objective "
                f"{config.objective!r} trains: choose one of {', '.join(presets.CLIP)}"
            )
        text = presets.CLIP[config.student.preset].text
    if teacher:
        _check_teacher(config, teacher)
        teacher = presets.with_vision(teacher, _teacher_spec(config, student, teacher))
    return Task(
        objective=config.objective,
        student=student,
        mean=teacher.mean if teacher else presets.OPENAI_MEAN,
        std=teacher.std if teacher else presets.OPENAI_STD,
        text=text,
        teacher=teacher,
        mask=_mask(config, student.tokens),
        cls_weight=config.loss.cls_weight,
        dtype=config.student.dtype,
        teacher_dtype=config.teacher.dtype,
        remat=config.student.remat,
    )


def _check_teacher(config: ConfigDict, teacher: ClipSpec) -> None:
    """It needs a class token, and a text tower that shares the space the student is to live in."""
    joint = OBJECTIVES[config.objective].joint_space
    lacks = "text tower" if joint and teacher.text is None else ""
    if teacher.vision.pool != "cls" or not teacher.vision.cls:
        lacks = "class token (it pools by attention)"
    elif joint and teacher.tokenizer != "clip":
        lacks = "CLIP tokenizer, by which zero-shot evaluation spells the names of classes"
    if lacks:
        raise UserError(
            f"config.teacher.path={config.teacher.path} has no {lacks}; objective "
            f"{config.objective!r} needs a teacher whose tokens share a space with its text: "
            "choose a CLIP whose image feature is its class token"
        )


def _mask(config: ConfigDict, tokens: int) -> masking.Mask:
    """How many of ``tokens`` are kept, and how they are chosen."""
    objective, mask = OBJECTIVES[config.objective], config.mask
    if not objective.masks:
        return masking.Mask(keep=tokens)
    if mask.kind not in objective.masks:
        raise UserError(
            f"config.mask.kind={mask.kind} is not for objective {config.objective!r}: choose one "
            "of " + ", ".join(objective.masks)
        )
    keep = masking.keep_count(tokens, mask.ratio)
    if not keep:
        raise UserError(f"config.mask.ratio={mask.ratio} keeps 0 of {tokens} patches: lower it")
    if keep == tokens and not objective.drops:
        raise UserError(
            f"config.mask.ratio={mask.ratio} masks none of {tokens} patches, and objective "
            f"{config.objective!r} predicts the masked ones: raise it"
        )
    _check_block(mask, keep, tokens)
    return masking.Mask(mask.kind, keep, mask.min_block)


def _check_block(mask: ConfigDict, keep: int, tokens: int) -> None:
    """Rectangles larger than what they have to cover are all refused: the mask would be random."""
    area = {"block": tokens - keep, "reversed_block": keep}.get(mask.kind, 0)
    if 0 < area < mask.min_block:
        raise UserError(
            f"config.mask.min_block={mask.min_block} is more than the {area} patches that "
            f"{mask.kind!r} covers with rectangles: choose at most {area}"
        )


def _student_spec(config: ConfigDict, teacher: ClipSpec | None) -> presets.VitSpec:
    """The student's preset at its input size, projecting into the teacher's space."""
    spec = presets.VIT[config.student.preset]
    spec = presets.resized(spec, config.student.image_size or spec.image_size)
    if spec.image_size % spec.patch_size:
        sizes = [n * spec.patch_size for n in (spec.grid, spec.grid + 1) if n]
        raise UserError(
            f"config.student.image_size={spec.image_size} is not a multiple of the patch size "
            f"{spec.patch_size}: choose {' or '.join(map(str, sizes))}"
        )
    if spec.pool != "cls":
        raise UserError(
            f"config.student.preset={config.student.preset} has no class token: choose one of "
            + ", ".join(name for name, vit in presets.VIT.items() if vit.pool == "cls")
        )
    if not teacher:
        return spec
    if not OBJECTIVES[config.objective].joint_space:
        return replace(spec, out_dim=spec.width, head_proj=False)
    return replace(spec, out_dim=teacher.vision.out_dim, head_proj=True)


def _teacher_spec(config: ConfigDict, student, teacher: ClipSpec) -> presets.VitSpec:
    """The teacher at the input size of the run, where its grid is the student's."""
    patch = teacher.vision.patch_size
    size = config.teacher.image_size or student.grid * patch
    if size != student.grid * patch:
        other = f"config.student.image_size={size // patch * student.patch_size}"
        raise UserError(
            f"config.teacher.image_size={size} gives the teacher a grid of {size / patch:g}, the "
            f"student's is {student.grid}: use config.teacher.image_size={student.grid * patch}"
            + (f" or {other}" if size % patch == 0 else "")
        )
    return presets.resized(teacher.vision, size)
