"""What ``uta-jax`` can do, as data: each command's arguments, and the one function it calls."""

import argparse
import os
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


def _train(args, overrides):
    from uta_jax.ledger import process_age
    from uta_jax.train import train

    config = read_config(args.config, overrides)
    train(config, args.workdir, args.allow_data_change, process_age())


def _evaluate(args, _):
    from uta_jax.evals import evaluate

    evaluate(args.workdir, exported=args.exported or "", json_file=args.json or "")


def _convert(args, _):
    from uta_jax.interop.listing import listing
    from uta_jax.interop.teacher import convert

    options = dict(
        fmt=args.format or "",
        preset=args.preset or "",
        image_size=args.image_size,
        digest=args.sha256 or "",
    )
    if args.check:
        for line in listing(args.src, **options):
            print(line)
        return
    if args.dst is None:
        raise UserError("name the directory to write (or only --check SRC)")
    found = convert(args.src, args.dst, args.overwrite, **options)
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


def _data(args, overrides):
    return DATA[args.action].run(args, overrides)


def _plan(args, overrides):
    # Before JAX looks for devices: the plan is made on the CPU, for whatever slice.
    os.environ["JAX_PLATFORMS"] = "cpu"
    kind, _, count = args.topology.partition(":")
    if kind == "cpu" and count.isdigit() and int(count):
        os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count={count}")
    from uta_jax.plan import plan

    key, _, values = args.compare.partition("=")
    variants = [f"--config.{key}={value}" for value in values.split(",")] if key else [""]
    plan(
        {each: read_config(args.config, overrides + [each] * bool(each)) for each in variants},
        args.topology,
        batch_per_chip=args.batch_per_chip,
        price=args.price,
        examples=args.examples,
        json_file=args.json or "",
    )


def _batch_per_chip(text: str) -> int:
    """An integer >= 1, or -1 for the word max."""
    if text != "max" and not (text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of images >= 1 nor max")
    return -1 if text == "max" else int(text)


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
                {"type": _batch_per_chip, "default": 0, "help": "images (default: "
                 "config.data.batch_size over all chips); max: the most that fit"},
            ),
            (
                "--compare",
                {"default": "", "metavar": "KEY=A,B", "help": "a column for each value of a key "
                 "of the recipe, as student.remat=none,attn,names,full"},
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
