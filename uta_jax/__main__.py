"""The command line, ``uta-jax COMMAND``: each command parses its arguments, calls one function."""

import argparse
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
    from uta_jax.interop.listing import listing
    from uta_jax.interop.teacher import convert

    kind = dict(fmt=args.format or "", preset=args.preset or "")
    if args.check:
        for line in listing(args.src, **kind):
            print(line)
        return
    if args.dst is None:
        raise UserError("name the directory to write (or only --check SRC)")
    found = convert(
        args.src,
        args.dst,
        args.overwrite,
        **kind,
        image_size=args.image_size,
        digest=args.sha256 or "",
    )
    print(f"{args.src} ({found.provenance['format']}) -> {args.dst}: {found.spec}")


def _export(args, _):
    from uta_jax import report

    if bool(args.workdir) == bool(args.model):
        raise UserError("give either --workdir (a run) or --model (a directory or file)")
    options = {name: getattr(args, name) for name in ("overwrite", "dtype", "licence", "home")}
    if args.workdir:
        report.export_run(args.workdir, args.format, args.out, **options)
    else:
        report.export_model(args.model, args.format, args.out, preset=args.preset, **options)


def _embed(args, _):
    from uta_jax.embed import embed

    names = ("images", "texts", "tokens", "keep", "batch_size", "dtype", "preset", "overwrite")
    options = {name: value for name in names if (value := getattr(args, name)) is not None}
    for name, shape in embed(args.model, args.out, **options).items():
        print(f"{args.out}: {name} {list(shape)}")


def _data(args, _):
    from uta_jax.data import emoji_scenes

    sizes = {name: getattr(args, name) for name in (*emoji_scenes.SPLITS, "size", "seed")}
    out = emoji_scenes.build(args.out, **{k: v for k, v in sizes.items() if v is not None})
    print(f"{out}: ready; read it with --config.data.source=tfds --config.data.path={out}")


def _report(args, _):
    from uta_jax.report import report

    report(args.workdir)


_WORKDIR = ("--workdir", {"required": True, "help": "directory of a training run"})
_OUT = ("--out", {"required": True, "help": "directory to write; it appears whole or not at all"})
_OVERWRITE = (
    "--overwrite",
    {"action": "store_true", "help": "replace an earlier export or conversion"},
)
_PRESET = (
    "--preset",
    {"default": "", "help": "the architecture of weights that come without a configuration"},
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
        "Turn any CLIP (Hugging Face, open_clip, EVA, timm, released UTA) into our own format.",
        "uta-jax convert checkpoints/clip-vit-base-patch16 checkpoints/clip_b16",
        (
            (
                "src",
                {
                    "help": "directory or file, asset:NAME, hf-hub:ORG/NAME[@REVISION], or "
                    "open_clip:ARCHITECTURE/TAG"
                },
            ),
            (
                "dst",
                {
                    "nargs": "?",
                    "help": "directory to write: weights.safetensors, spec.json, and the "
                    "tokenizer, if the model has its own",
                },
            ),
            (
                "--check",
                {"action": "store_true", "help": "only print what each tensor would become"},
            ),
            ("--format", {"help": "of src, where its configuration or its names do not tell"}),
            ("--preset", {"help": "architecture of src, where it has no configuration"}),
            ("--sha256", {"help": "what the weights of src must hash to"}),
            (
                "--image_size",
                {"type": int, "default": 0, "help": "resample positions for this size in pixels"},
            ),
            _OVERWRITE,
        ),
        _convert,
    ),
    "export": Command(
        "Write a run's student, or any model that `convert` reads, for PyTorch libraries.",
        "uta-jax export --workdir=runs/demo --format=hf --out=exported/demo",
        (
            ("--workdir", {"help": "a run: its newest student, with its teacher's text tower"}),
            ("--model", {"help": "instead of a run: whatever `uta-jax convert` reads"}),
            _PRESET,
            (
                "--format",
                {"choices": ("hf", "open_clip", "timm", "uta"), "default": "hf",
                 "help": "hf: transformers (CLIPModel, SiglipModel, Dinov2Model); open_clip; timm: "
                 "the vision tower alone; uta: the state dict of the released UTA models"},
            ),
            _OUT,
            _OVERWRITE,
            (
                "--dtype",
                {"choices": ("float32", "float16"), "default": "float32", "help": "of the weights"},
            ),
            ("--licence", {"default": "", "help": "of the weights, for the model card"}),
            (
                "--home",
                {"default": "", "help": "hf-hub:ORG/NAME or local-dir:PATH, where the directory is "
                 "to lie (default OUT); open_clip finds the arguments of UTA's towers there"},
            ),
        ),
        _export,
    ),
    "embed": Command(
        "Features of images and texts by any model, not L2-normalised, as arrays in one .npz file.",
        "uta-jax embed --model=checkpoints/clip_b16 --images=photos --texts=texts.txt --out=x.npz",
        (
            (
                "--model",
                {"required": True, "help": "whatever `uta-jax convert` reads, or a run's workdir"},
            ),
            _PRESET,
            ("--images", {"help": "a folder, a .tar, or an .npy of normalised NCHW or NHWC"}),
            ("--texts", {"help": "a UTF-8 file, one text a line"}),
            (
                "--tokens",
                {"action": "store_true", "help": "also all projected tokens, CLS first"},
            ),
            (
                "--keep",
                {
                    "help": "an .npy of int [images, k]: run on CLS and these patches alone "
                    "(row-major from 0)"
                },
            ),
            ("--batch-size", {"type": int, "help": "at a time, on all devices (default 64)"}),
            ("--dtype", {"choices": ("float32", "bfloat16"), "help": "to compute in (float32)"}),
            (
                "--out",
                {"required": True, "help": "the .npz to write; it appears whole or not at all"},
            ),
            ("--overwrite", {"action": "store_true", "help": "replace an earlier file"}),
        ),
        _embed,
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
    if rest and args.command != "train":
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
