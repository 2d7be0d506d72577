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
    run: Callable[[argparse.Namespace, list[str]], int | None]  # the exit code, if not 0


def _train(args, overrides):
    from uta_jax.train import train

    train(_read_config(args.config, overrides), args.workdir, args.allow_data_change)


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


def _data_emoji_scenes(args, _):
    from uta_jax.data import emoji_scenes

    sizes = {name: getattr(args, name) for name in (*emoji_scenes.SPLITS, "size", "seed")}
    out = emoji_scenes.build(args.out, **{k: v for k, v in sizes.items() if v is not None})
    print(f"{out}: ready; read it with --config.data.source=tfds --config.data.path={out}")


def _data_verify(args, overrides):
    from uta_jax.data.verify import verify

    report = verify(
        _open_data(args, overrides),
        workers=args.workers,
        json_file=args.json,
        hashes=args.hashes,
        write_hashes=args.write_hashes,
    )
    return int(not report["good"])


def _data_index(args, _):
    from uta_jax.data.tars import build_index

    for name, value in build_index(args.path, split=args.split).items():
        print(f"{name:9} {value}")


def _data_bench(args, overrides):
    from uta_jax.data.bench import bench

    source = _open_data(args, overrides) if args.data else None
    bench(source, args.image_size, seconds=args.seconds, workers=args.workers, json_file=args.json)


def _open_data(args, overrides):
    """The training examples of a recipe, or those at a path."""
    from uta_jax.data.sources import open_source
    from uta_jax.data.verify import guess_kind

    if args.data.endswith(".py"):
        from uta_jax.config import open_data

        return open_data(_read_config(args.data, overrides).data)
    return open_source(args.source or guess_kind(args.data), args.data, args.split)


def _data(args, overrides):
    return DATA[args.action].run(args, overrides)


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

_DATA = ("data", {"help": "a recipe, configs/NAME.py, or the path of a data set"})
_SOURCE = ("--source", {"help": "kind of the data set at the path (default: guessed)"})
_SPLIT = ("--split", {"default": "", "help": "of the data set at the path"})
_JSON = ("--json", {"help": "write the same figures to this file"})

# What `uta-jax data` can do.
DATA = {
    "emoji_scenes": Command(
        "Build emoji_scenes: drawings with captions, labels and masks; no download.",
        "uta-jax data emoji_scenes --out=data/emoji_scenes",
        (
            _OUT,
            ("--train", {"type": int, "help": "scenes to train on (default 30000)"}),
            ("--val_single", {"type": int, "help": "scenes of one object (default 1280)"}),
            ("--val_scenes", {"type": int, "help": "scenes of one to four objects (default 1000)"}),
            ("--size", {"type": int, "help": "side of a scene in pixels (default 80)"}),
            ("--seed", {"type": int, "help": "of all that is random (default 0)"}),
        ),
        _data_emoji_scenes,
    ),
    "verify": Command(
        "Read and decode every example: what is there, what is bad; exit code 1 if anything is.",
        "uta-jax data verify data/emoji_scenes --split=train --write-hashes=hashes.txt",
        (
            _DATA, _SOURCE, _SPLIT, _JSON,
            ("--workers", {"type": int, "default": os.cpu_count(), "help": "processes that read"}),
            ("--write-hashes", {"help": "write a hash of every example to this file"}),
            ("--hashes", {"help": "compare every example with a file of hashes written before"}),
        ),
        _data_verify,
    ),
    "index": Command(
        "Index the tar shards at a path, as training on them would do at its start.",
        "uta-jax data index data/shards",
        (("path", {"help": "as config.data.path"}), _SPLIT),
        _data_index,
    ),
    "bench": Command(
        "Images a second and core by step of the way, against torchvision where it is installed.",
        "uta-jax data bench --workers=2",
        (
            ("data", {"nargs": "?", "help": "a recipe or a path (default: JPEGs of 500x375)"}),
            _SOURCE, _SPLIT, _JSON,
            ("--workers", {"type": int, "default": 1, "help": "of every loader"}),
            ("--image_size", {"type": int, "default": 224, "help": "of the crops, in pixels"}),
            ("--seconds", {"type": float, "default": 30.0, "help": "how long to measure"}),
        ),
        _data_bench,
    ),
}  # fmt: skip

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
            (
                "--allow_data_change",
                {"action": "store_true", "help": "go on with other data, another seed or batch "
                 "size than the checkpoint was saved with, after as many examples as were seen"},
            ),
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
        "Build a data set to try things with, check one, index one, or measure how fast it loads.",
        "uta-jax data verify configs/demo.py",
        (),
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
    parser = _Parser(
        prog="uta-jax",
        description="Unmasked Token Alignment in JAX: train, evaluate, convert, export.",
        epilog="Example: uta-jax train --config=configs/demo.py --workdir=runs/demo",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"uta-jax {__version__}")
    _add_commands(parser, COMMANDS, "command", "COMMAND")
    return parser


def _add_commands(parser, commands: dict[str, Command], dest: str, metavar: str) -> None:
    subparsers = parser.add_subparsers(dest=dest, required=True, metavar=metavar)
    for name, command in commands.items():
        sub = subparsers.add_parser(
            name,
            help=command.summary,
            description=command.summary,
            epilog=f"Example:\n  {command.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        for argument, options in command.arguments:
            sub.add_argument(argument, **options)
        if name == "data":
            _add_commands(sub, DATA, "action", "ACTION")


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
    """Run one command; its exit code, or 2 after one line about a mistake of the user's."""
    args, rest = _parser().parse_known_args(argv)
    if rest and not (args.command == "train" or str(getattr(args, "data", "")).endswith(".py")):
        name = f"uta-jax {args.command}"
        print(f"{name}: unexpected argument {rest[0]!r} (see {name} --help)", file=sys.stderr)
        return 2
    try:
        return COMMANDS[args.command].run(args, rest) or 0
    except UserError as error:
        print(f"uta-jax {args.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
