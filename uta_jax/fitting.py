"""A step that needs more memory than a chip has: by how much, and what would make it fit.

Whatever is named as fitting was compiled. Arithmetic only chooses what to compile, and rules out
what cannot fit: parameters, moments, average and teacher alone are known to the byte.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

from ml_collections import ConfigDict

from uta_jax import UserError


class DoesNotFit(UserError):
    """A step needs more memory than a chip has; bytes."""

    def __init__(self, needs: float, has: float):
        self.needs, self.has = needs, has
        super().__init__(
            f"the step needs at least {needs / 1e9:.2f} GB of the {has / 1e9:.2f} GB of a chip "
            f"that programs can use, {(needs - has) / 1e9:.2f} GB too much"
        )


def largest_that_fits(compiled: Callable, probes: int = 5):
    """The plan with the largest batch per chip, a multiple of 8, that ``compiled`` accepts.

    Memory is nearly linear in the batch, so each probe aims at what the last one leaves free.
    Raises DoesNotFit where not even 8 images fit.
    """
    best, too_many = compiled(8), 2**30
    for _ in range(probes):
        aim = min(best.largest_batch_per_chip // 8 * 8, too_many - 8)
        if aim <= best.batch_per_chip:
            break
        try:
            best = compiled(aim)
        except DoesNotFit:
            too_many = aim
            best = replace(best, largest_batch_per_chip=(best.batch_per_chip + aim) // 2)
    return best


def what_would_fit(
    error: DoesNotFit, config: ConfigDict, per_chip: int, compiled: Callable, held: Callable
) -> str:
    """Which one change makes a step fit that needed ``error.needs`` with ``per_chip`` images.

    Args:
      compiled: (config, images per chip) -> Plan, or DoesNotFit.
      held: config -> bytes on a chip before the step; UserError where the mesh cannot be.
    """
    before = held(config)
    found = list(_other_fsdp(error, config, per_chip, compiled, held, before))
    if before < error.has:
        found += _fewer_images(error, config, per_chip, compiled, before)
        found += _remat(config, per_chip, compiled)
        note = ""
    else:
        note = f"; neither batch nor remat can: state and teacher alone take {before / 1e9:.2f} GB"
    fitting = [text for fits, text in found if fits]
    failing = [text for fits, text in found if not fits]
    told = "compiled, " + " or ".join(fitting) + " fits" if fitting else "nothing tried fits"
    return told + ("; does not: " + ", ".join(failing) if failing else "") + note


def _tried(flag: str, compiled: Callable, *arguments) -> tuple[bool, str]:
    """Whether it fits, and the flag with what it needs."""
    try:
        return True, f"{flag} ({compiled(*arguments).peak_bytes / 1e9:.2f} GB)"
    except DoesNotFit as error:
        return False, f"{flag} ({error.needs / 1e9:.2f} GB)"


def _fewer_images(error, config, per_chip, compiled, before) -> Iterator[tuple[bool, str]]:
    """Memory is nearly linear in the images; a second aim, if the first is too high."""
    needs = error.needs
    for _ in range(2):
        per_chip = int(0.99 * per_chip * (error.has - before) / (needs - before))
        per_chip -= per_chip % 8 if per_chip >= 8 else 0
        if not per_chip:
            return
        try:
            peak = compiled(config, per_chip).peak_bytes
        except DoesNotFit as again:
            needs = again.needs
        else:
            yield True, f"--batch-per-chip={per_chip} ({peak / 1e9:.2f} GB)"
            return
    yield False, f"--batch-per-chip={per_chip} ({needs / 1e9:.2f} GB)"


def _remat(config, per_chip, compiled) -> Iterator[tuple[bool, str]]:
    if config.student.remat != "full":
        config = _changed(config, "student", remat="full")
        yield _tried("--config.student.remat=full", compiled, config, per_chip)


def _other_fsdp(error, config, per_chip, compiled, held, before) -> Iterator[tuple[bool, str]]:
    """The least sharding that by arithmetic is enough."""
    size = config.mesh.fsdp
    while 0 < size < 2**16:
        size *= 2
        wider = _changed(config, "mesh", data=-1, fsdp=size)
        try:
            needs = error.needs - before + held(wider)
        except UserError:  # more than there are devices, or no divisor
            return
        if needs < error.has:
            yield _tried(f"--config.mesh.fsdp={size}", compiled, wider, per_chip)
            return


def _changed(config: ConfigDict, section: str, **values) -> ConfigDict:
    config = config.copy_and_resolve_references()
    config[section].update(values)
    return config
