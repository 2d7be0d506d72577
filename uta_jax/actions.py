"""What ``uta-jax data`` and ``uta-jax checkpoint`` can do, as data, and what a command is."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from uta_jax import UserError
from uta_jax.config_files import read_config


@dataclass(frozen=True)
class Command:
    """A subcommand: what it does, an example, its arguments and the function that runs it."""

    summary: str
    example: str
    arguments: tuple[tuple[str, dict], ...]
    run: Callable[[argparse.Namespace, list[str]], int | None]  # the exit code, if not 0


def _data_emoji_scenes(args, _):
    from uta_jax.data import emoji_scenes

    sizes = {name: getattr(args, name) for name in (*emoji_scenes.SPLITS, "size", "seed")}
    out = emoji_scenes.build(args.out, **{k: v for k, v in sizes.items() if v is not None})
    print(f"{out}: ready; read it with --config.data.source=tfds --config.data.path={out}")


def _data_verify(args, overrides):
    from uta_jax.data.files import cpu_count
    from uta_jax.data.verify import verify

    source, data = _open_data(args, overrides)
    names = ("timeout_s", "allow_truncated")
    report = verify(
        source,
        **{name: data[name] for name in names if data},
        workers=cpu_count() if args.workers is None else args.workers,
        json_file=args.json,
        hashes=args.hashes,
        write_hashes=args.write_hashes,
    )
    return int(not report["good"])


def _data_index(args, _):
    from uta_jax.data.tarbuild import build_index

    for name, value in build_index(args.path, split=args.split).items():
        print(f"{name:9} {value}")


def _data_bench(args, overrides):
    from uta_jax.data.bench import bench

    source, data = _open_data(args, overrides) if args.data else (None, None)
    options = {"crop_scale": data.crop_scale} if data else {}
    options |= {"seconds": args.seconds, "workers": args.workers, "json_file": args.json}
    bench(source, args.image_size, **options)


def _open_data(args, overrides):
    """(training examples, section `data`) of a recipe, or (those at a path, None)."""
    from uta_jax.data.sources import open_source
    from uta_jax.data.verify import guess_kind

    if args.data.endswith(".py"):
        from uta_jax.config import open_data

        if args.source or args.split:
            raise UserError("--source, --split: a recipe names its own; --config.data.split=NAME")
        data = read_config(args.data, overrides).data
        return open_data(data), data
    return open_source(args.source or guess_kind(args.data), args.data, args.split), None


def _checkpoint_list(args, _):
    from uta_jax.checkpoint import tools

    print("\n".join(tools.listing(args.workdir)))


def _checkpoint_verify(args, _):
    from uta_jax.checkpoint import tools

    lines, good = tools.verify(args.workdir)
    print("\n".join(lines))
    return int(not good)


def _checkpoint_copy(args, _):
    from uta_jax.checkpoint import tools

    print(f"copied and verified: {tools.copy(args.workdir, args.out, args.step)}")


OUT = ("--out", {"required": True, "help": "directory to write; it appears whole or not at all"})
_DATA = ("data", {"help": "a recipe, configs/NAME.py, or the path of a data set"})
_SOURCE = ("--source", {"help": "kind of the data set at the path (default: guessed)"})
_SPLIT = ("--split", {"default": "", "help": "of the data set at the path"})
JSON = ("--json", {"help": "write the same figures to this file"})

# What `uta-jax data` can do.
DATA = {
    "emoji_scenes": Command(
        "Build emoji_scenes: drawings with captions, labels and masks; no download.",
        "uta-jax data emoji_scenes --out=data/emoji_scenes",
        (
            OUT,
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
            _DATA, _SOURCE, _SPLIT, JSON,
            ("--workers", {"type": int, "help": "processes that read (default: all processors)"}),
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
            _SOURCE, _SPLIT, JSON,
            ("--workers", {"type": int, "default": 1, "help": "of every loader"}),
            ("--image_size", {"type": int, "default": 224, "help": "of the crops, in pixels"}),
            ("--seconds", {"type": float, "default": 30.0, "help": "how long to measure"}),
        ),
        _data_bench,
    ),
}  # fmt: skip

_RUN = ("workdir", {"help": "directory of a training run"})

# What `uta-jax checkpoint` can do.
CHECKPOINT = {
    "list": Command(
        "The checkpoints of a run, with their sizes, and those in quarantine.",
        "uta-jax checkpoint list runs/demo",
        (_RUN,),
        _checkpoint_list,
    ),
    "verify": Command(
        "Compare every byte of every checkpoint with what was written; exit code 1 if any differs.",
        "uta-jax checkpoint verify runs/demo",
        (_RUN,),
        _checkpoint_verify,
    ),
    "copy": Command(
        "Copy a checkpoint into a new workdir, whole and verified.",
        "uta-jax checkpoint copy runs/demo /backup/demo",
        (
            _RUN,
            ("out", {"help": "the new workdir"}),
            ("--step", {"type": int, "help": "which (default: the newest that is good)"}),
        ),
        _checkpoint_copy,
    ),
}  # fmt: skip

# Commands that have commands of their own.
ACTIONS = {"data": DATA, "checkpoint": CHECKPOINT}
