"""The command line, ``uta-jax COMMAND``: each command parses its arguments, calls one function."""

import argparse
import os
import runpy
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from uta_jax import UserError, __version__


@dataclass(frozen=True)
class Command:
    """A subcommand: what it does, an example, its arguments and the function that runs it."""

    summary: str
    example: str
    arguments: tuple[tuple[str, dict], ...]
    run: Callable[[argparse.Namespace, list[str]], None]


def _train(args, overrides):
    from uta_jax.train import train

    train(_read_config(args.config, overrides), args.workdir)


def _evaluate(args, _):
    from uta_jax.evals import evaluate

    evaluate(args.workdir, exported=args.exported or "", json_file=args.json or "")


def _convert(args, _):
    from uta_jax.interop.teacher import convert

    found = convert(args.src, args.dst, overwrite=args.overwrite)
    print(f"{args.src} ({found.provenance['format']}) -> {args.dst}: {found.spec}")


def _export(args, _):
    from uta_jax.report import export_run

    export_run(args.workdir, args.format, args.out, overwrite=args.overwrite, dtype=args.dtype)


def _data(args, _):
    from uta_jax.data import emoji_scenes

    sizes = {name: getattr(args, name) for name in (*emoji_scenes.SPLITS, "size", "seed")}
    out = emoji_scenes.build(args.out, **{k: v for k, v in sizes.items() if v is not None})
    print(f"{out}: ready; read it with --config.data.source=tfds --config.data.path={out}")


def _plan(args, overrides):
    # Before JAX looks for devices: the plan is made on the CPU, for whatever slice.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from uta_jax.plan import plan

    config = _read_config(args.config, overrides)
    plan(
        config,
        args.topology,
        batch_per_chip=args.batch_per_chip,
        price=args.price,
        examples=args.examples,
        json_file=args.json or "",
    )


def _report(args, _):
    from uta_jax.report import report

    report(args.workdir)


_WORKDIR = ("--workdir", {"required": True, "help": "directory of a training run"})
_OUT = ("--out", {"required": True, "help": "directory to write; it appears whole or not at all"})
_OVERWRITE = (
    "--overwrite",
    {"action": "store_true", "help": "replace an earlier export or conversion"},
)

COMMANDS = {
    "train": Command(
        "Train a student in a workdir; goes on from the newest checkpoint that stands there.",
        "uta-jax train --config=configs/demo.py --workdir=runs/demo --config.optim.lr=1e-3",
        (
            (
                "--config",
                {
                    "required": True,
                    "help": "a recipe, configs/NAME.py; --config.KEY=VALUE replaces one of its "
                    "values (all keys with their units: uta_jax/config.py)",
                },
            ),
            ("--workdir", {"required": True, "help": "directory for checkpoints and metrics"}),
        ),
        _train,
    ),
    "evaluate": Command(
        "Zero-shot accuracy of a run's student and of its teacher, as a table.",
        "uta-jax evaluate --workdir=runs/demo --json=scores.json",
        (
            _WORKDIR,
            ("--exported", {"help": "also this exported Hugging Face directory, run in PyTorch"}),
            ("--json", {"help": "write the same figures to this file"}),
        ),
        _evaluate,
    ),
    "convert": Command(
        "Turn a CLIP checkpoint (Hugging Face directory, released UTA weights) into our format.",
        "uta-jax convert checkpoints/clip-vit-base-patch16 checkpoints/clip_b16",
        (
            ("src", {"help": "directory or file of the checkpoint, or asset:NAME"}),
            ("dst", {"help": "directory to write: weights.safetensors and spec.json"}),
            _OVERWRITE,
        ),
        _convert,
    ),
    "export": Command(
        "Write a run's student, with the text tower it is aligned to, for PyTorch libraries.",
        "uta-jax export --workdir=runs/demo --format=hf --out=exported/demo",
        (
            _WORKDIR,
            (
                "--format",
                {"choices": ("hf", "uta"), "default": "hf", "help": "hf: transformers.CLIPModel; "
                 "uta: the state dict of the released UTA models"},
            ),
            _OUT,
            _OVERWRITE,
            (
                "--dtype",
                {"choices": ("float32", "float16"), "default": "float32", "help": "of the weights"},
            ),
        ),
        _export,
    ),
    "data": Command(
        "Build a data set: emoji_scenes, drawings with captions, labels and masks; no download.",
        "uta-jax data emoji_scenes --out=data/emoji_scenes",
        (
            ("name", {"choices": ("emoji_scenes",), "help": "which data set"}),
            _OUT,
            ("--train", {"type": int, "help": "scenes to train on (default 30000)"}),
            ("--val_single", {"type": int, "help": "scenes of one object (default 1280)"}),
            ("--val_scenes", {"type": int, "help": "scenes of one to four objects (default 1000)"}),
            ("--size", {"type": int, "help": "side of a scene in pixels (default 80)"}),
            ("--seed", {"type": int, "help": "of all that is random (default 0)"}),
        ),
        _data,
    ),
    "plan": Command(
        "Compile a recipe's step for a TPU slice: does it fit, how fast is it, what does it cost.",
        "uta-jax plan --config=configs/uta_b16.py --config.teacher.path=preset:eva01_g14_plus "
        "--topology=v5e:4x4 --batch-per-chip=64 --config.mesh.fsdp=16 --price=1.2",
        (
            ("--config", {"required": True, "help": "a recipe; --config.KEY=VALUE as in train"}),
            (
                "--topology",
                {"required": True, "help": "v5e:4x4, v5e:16x16, v5p:4x4x4, v6e:8x8 ... or cpu:N"},
            ),
            (
                "--batch-per-chip",
                {"type": int, "default": 0, "help": "images (default: config.data.batch_size "
                 "over all chips)"},
            ),
            ("--price", {"type": float, "default": 0.0, "help": "of one chip for one hour"}),
            (
                "--examples",
                {"type": int, "default": 14_197_122, "help": "length of the training set, for "
                 "recipes in epochs (default: ImageNet-21k)"},
            ),
            ("--json", {"help": "write the same figures to this file"}),
        ),
        _plan,
    ),
    "report": Command(
        "Pictures and a summary of a run: samples.png, curves.png, summary.json.",
        "uta-jax report --workdir=runs/demo",
        (_WORKDIR,),
        _report,
    ),
}  # fmt: skip


class _Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, as every other mistake is reported."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        prog="uta-jax",
        description="Unmasked Token Alignment in JAX: train, evaluate, convert, export.",
        epilog="Example: uta-jax train --config=configs/demo.py --workdir=runs/demo",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"uta-jax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=command.summary,
            description=command.summary,
            epilog=f"Example:\n  {command.example}",
            formatter_class=raw,
            allow_abbrev=False,
        )
        for argument, options in command.arguments:
            sub.add_argument(argument, **options)
    return parser


# What Python, absl and ml_collections raise for a key or a value that they refuse.
_MISTAKES = (flags.Error, AttributeError, KeyError, TypeError, ValueError)


def _read_config(path: str, arguments: list[str]):
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


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0, or 2 after one line about a mistake of the user's."""
    args, rest = _parser().parse_known_args(argv)
    if rest and args.command not in ("train", "plan"):
        name = f"uta-jax {args.command}"
        print(f"{name}: unexpected argument {rest[0]!r} (see {name} --help)", file=sys.stderr)
        return 2
    try:
        COMMANDS[args.command].run(args, rest)
    except UserError as error:
        print(f"uta-jax {args.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
