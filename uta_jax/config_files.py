"""Configurations on disk: recipes with their overrides, and what a run was started with."""

import json
import runpy
import sys
from contextlib import contextmanager
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from uta_jax import UserError
from uta_jax.config import default_config
from uta_jax.places import find_place
from uta_jax.runlocal import shrink

# What Python, absl and ml_collections raise for a key or a value that they refuse.
_MISTAKES = (flags.Error, AttributeError, KeyError, TypeError, ValueError)


def read_config(path: str, arguments: list[str]):
    """The recipe at ``path`` with ``--config.KEY=VALUE`` overrides; every mistake a UserError."""
    if not Path(path).is_file():
        raise UserError(f"--config={path}: no such file; name a recipe, such as configs/demo.py")
    if (folder := str(Path(path).resolve().parent)) not in sys.path:
        sys.path.append(folder)  # a recipe may import its neighbours, as a script may
    with _blame(f"--config={path}"):
        config = runpy.run_path(path)["get_config"]().lock()
    for override in _overrides(arguments):
        with _blame(override):
            argv, values = ["uta-jax", override], flags.FlagValues()
            config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
            values(argv)
            config = values.config
    if config.runlocal:
        replaced = shrink(config)
        if find_place().index == 0:  # the processes of a run do not know each other yet
            for key, (old, new) in replaced.items():
                print(f"runlocal: {key}: {old!r} -> {new!r}")
    return config


def _overrides(arguments: list[str]) -> list[str]:
    """``--config.KEY=VALUE`` each, also of those written as ``--config.KEY VALUE``."""
    overrides = []
    for argument in arguments:
        if argument.startswith("--config."):
            overrides.append(argument)
        elif overrides and "=" not in overrides[-1] and not argument.startswith("--"):
            overrides[-1] += f"={argument}"
        else:
            raise UserError(f"unexpected argument {argument!r}: write --config.KEY=VALUE")
    return overrides


@contextmanager
def _blame(culprit: str):
    """Turn a refusal into one line that names its cause, freed of what is wrapped around it."""
    try:
        yield
    except _MISTAKES as error:
        inner = error
        while inner.args and isinstance(inner.args[0], Exception):
            inner = inner.args[0]
        reason = "no such key: " if isinstance(inner, KeyError) else ""
        reason += " ".join(" ".join(map(str, inner.args)).split())
        raise UserError(f"{culprit}: {reason} (all keys: uta_jax/config.py)") from error


def save_config(config: ConfigDict, path: Path) -> None:
    """Write the resolved configuration as JSON; an interruption leaves the old file."""
    new = path.with_suffix(".tmp")
    new.write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    new.replace(path)


def load_config(path: Path) -> ConfigDict:
    """Read what ``save_config`` wrote; keys that are unknown today are an error."""
    if not path.is_file():
        raise UserError(f"{path} is missing: not the workdir of a training run")
    config = default_config()
    try:
        config.update(_tuples(json.loads(path.read_text())))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not a configuration of this version: {reason}") from error
    return config


def _tuples(value):
    """JSON has no tuples; the configuration has no lists."""
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
