"""What ``uta-jax`` can do, as data: each command's arguments, and the one function it calls."""

import argparse
import os

from uta_jax import UserError
from uta_jax.actions import ACTIONS, JSON, OUT, Command
from uta_jax.config_files import read_config


def _train(args, overrides):
    from uta_jax.ledger import process_age
    from uta_jax.replay import replay
    from uta_jax.train import train

    config = read_config(args.config, overrides)
    if args.replay is not None:
        replay(config, args.workdir, args.replay)
        return
    train(config, args.workdir, args.allow_data_change, process_age())


def _act(args, overrides):
    return ACTIONS[args.command][args.action].run(args, overrides)


def _evaluate(args, _):
    from uta_jax import processes
    from uta_jax.evals import evaluate

    processes.refuse_several("evaluate")
    evaluate(
        args.workdir, exported=args.exported or "", json_file=args.json or "", wanted=args.eval
    )


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
    from uta_jax import processes, publish

    if bool(args.workdir) == bool(args.model):
        raise UserError("give either --workdir (a run) or --model (a directory or file)")
    options = {name: getattr(args, name) for name in ("overwrite", "dtype", "licence", "home")}
    if args.workdir:
        with processes.started():
            publish.export_run(args.workdir, args.format, args.out, **options)
            processes.gather("written", None)
    else:
        publish.export_model(args.model, args.format, args.out, preset=args.preset, **options)


def _embed(args, _):
    from uta_jax.embed import embed

    names = ("images", "texts", "tokens", "keep", "batch_size", "dtype", "preset", "overwrite")
    options = {name: value for name in names if (value := getattr(args, name)) is not None}
    for name, shape in embed(args.model, args.out, **options).items():
        print(f"{args.out}: {name} {list(shape)}")


def _plan(args, overrides):
    # Before JAX looks for devices: the plan is made on the CPU, for whatever slice.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from uta_jax.chips import host_count
    from uta_jax.plan import plan

    if count := host_count(args.topology):
        os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count={count}")

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
    from uta_jax import processes
    from uta_jax.report import report

    processes.refuse_several("report")
    report(args.workdirs, args.out or "", args.json or "")


_WORKDIR = ("--workdir", {"required": True, "help": "directory of a training run"})
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
            (
                "--allow_data_change",
                {"action": "store_true", "help": "go on with other data, another seed or batch "
                 "size than the checkpoint was saved with, after as many examples as were seen"},
            ),
            (
                "--replay",
                {"type": int, "metavar": "STEP", "help": "train nothing; compute this update once "
                 "more and print its examples, its loss and the norms of its gradient"},
            ),
        ),
        _train,
    ),
    "evaluate": Command(
        "What a run's student and its teacher can do, as a table: zeroshot, retrieval, knn, "
        "linear_probe, dense, alignment.",
        "uta-jax evaluate --workdir=runs/demo --eval zeroshot knn --json=scores.json",
        (
            _WORKDIR,
            ("--eval", {"nargs": "+", "default": (), "metavar": "NAME",
                        "help": "what to measure (default: config.eval.names of the run)"}),
            ("--exported", {"help": "also this exported Hugging Face directory, run in PyTorch"}),
            JSON,
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
            OUT,
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
    "checkpoint": Command(
        "List, verify or copy the checkpoints of a run.",
        "uta-jax checkpoint verify runs/demo",
        (),
        _act,
    ),
    "data": Command(
        "Build a data set to try things with, check one, index one, or measure how fast it loads.",
        "uta-jax data verify configs/demo.py",
        (),
        _act,
    ),
    "plan": Command(
        "Compile a recipe's step for a TPU slice: does it fit, how fast is it, what does it cost.",
        "uta-jax plan --config=configs/uta_b16.py --config.teacher.path=preset:eva01_g14_plus "
        "--topology=v5e:4x4 --batch-per-chip=64 --config.mesh.fsdp=16 --price=1.2",
        (
            ("--config", {"required": True, "help": "a recipe; --config.KEY=VALUE as in train"}),
            (
                "--topology",
                {"required": True, "help": "v5e:4x4, v5p:4x4x4, v6e:8x8 ...; gpu:h100x8 ... (a "
                 "roofline); or cpu:N"},
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
            JSON,
        ),
        _plan,
    ),
    "report": Command(
        "One or more runs as an HTML page whole in itself: curves, evaluations, time, pictures.",
        "uta-jax report runs/demo runs/other --out=both.html",
        (
            ("workdirs", {"nargs": "+", "metavar": "WORKDIR", "help": "of training runs"}),
            ("--out", {"help": "the page (default: report.html in the first WORKDIR)"}),
            JSON,
        ),
        _report,
    ),
}  # fmt: skip
