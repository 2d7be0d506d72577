"""A path -> what lies there: weights, their format and their specification, before any is read.

The format and the specification come from the configuration beside the weights. Where there is
none, the names of the tensors tell the format, by its table, and their shapes the preset.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from importlib import resources
from math import isqrt, prod
from pathlib import Path
from typing import Any

from uta_jax import UserError
from uta_jax.interop import hub, translate
from uta_jax.interop.files import TORCH_FILES, Tensor, open_weights, read_json
from uta_jax.interop.hf_config import HF_FORMATS, hf_format, hf_spec
from uta_jax.interop.hf_processor import TOKENIZER_FILES
from uta_jax.interop.keymaps import FORMATS
from uta_jax.interop.open_clip_config import OPEN_CLIP_CONFIG, model_spec, open_clip_spec
from uta_jax.interop.specs import spec_from_json
from uta_jax.interop.timm_config import timm_spec
from uta_jax.models.presets import CLIP, VIT, ClipSpec, VitSpec, resized, tower_alone, with_vision

SPEC_FILE = "spec.json"
WEIGHTS_FILE = "weights.safetensors"
SUFFIXES = (".safetensors", *TORCH_FILES)
# Weights of a family's directory, the first that is there.
PLAIN_FILES = ("model.safetensors", "pytorch_model.bin")
OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
# Every specification that weights without a configuration can have; towers alone among them.
PRESETS: dict[str, tuple[ClipSpec, ...]] = {
    name: ((CLIP[name],) if name in CLIP else ()) + (tower_alone(name),) for name in VIT
}


@dataclass(frozen=True)
class Found:
    """Where a checkpoint lies, and what its configuration says of it."""

    where: str
    weights: tuple[Path, ...]
    fmt: str = ""  # empty, as ``spec``: to be told from the tensors
    spec: ClipSpec | None = None
    sha256: str = ""  # what the weights must hash to, where that is on record
    source: Mapping[str, str] | None = None  # provenance on record


def find(path: str | Path, fmt: str = "", preset: str = "") -> Found:
    """The checkpoint at ``path``: a directory, a file, ``asset:``, ``hf-hub:`` or ``open_clip:``.

    ``fmt`` chooses among several in one directory. Raises UserError for what is missing, unreadable
    or at odds with ``fmt`` or ``preset``.
    """
    if fmt and fmt not in FORMATS:
        raise UserError(f"format={fmt!r} must be one of: {', '.join(FORMATS)}")
    if preset and preset not in PRESETS:
        nearest = get_close_matches(preset, PRESETS, 1, cutoff=0.0)[0]
        raise UserError(f"preset={preset!r} is not known; the nearest is {nearest!r}")
    found = _find(str(path), fmt)
    if fmt and found.fmt and fmt != found.fmt:
        raise UserError(f"{found.where}: is {found.fmt!r} by its configuration, not {fmt!r}")
    if preset and found.spec:
        _check_preset(found, preset)
    return replace(found, fmt=found.fmt or fmt)


def _find(path: str, fmt: str) -> Found:
    if path.startswith("open_clip:"):
        tag = hub.open_clip_tag(path)
        fmt, spec = model_spec(tag.model, tag.preprocess, path)
        return Found(path, _weights(tag.folder, tag.files or OPEN_CLIP_FILES), fmt, spec)
    if path.startswith("hf-hub:"):
        return _find_directory(hub.snapshot(path), path, fmt)
    root = _asset(path) if path.startswith("asset:") else Path(path)
    try:
        root.stat()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file or directory") from None
    except (OSError, ValueError) as error:  # of a name that is too long, or holds a NUL, say
        raise UserError(f"{path!r}: no such file or directory ({error})") from None
    return _find_file(root) if root.is_file() else _find_directory(root, path, fmt)


def _asset(path: str) -> Path:
    assets = Path(str(resources.files("uta_jax"))) / "assets"
    name = path.removeprefix("asset:")
    names = sorted(p.name for p in assets.iterdir() if p.is_dir()) if assets.is_dir() else []
    if name not in names:
        raise UserError(f"{path}: no such asset; there are: {', '.join(names) or 'none'}")
    return assets / name


# By configuration


def _find_directory(root: Path, path: str, fmt: str) -> Found:
    if (root / SPEC_FILE).is_file():
        return _from_record(root / SPEC_FILE)
    options = _configured(root)
    whole = [x for x in options if all(file.is_file() for file in x[0])]
    for weights, read in whole or options:
        kind, spec = read()
        if fmt in ("", kind) or len(whole or options) == 1:
            _check_family(path, root, spec)
            return Found(str(root), weights, kind, spec)
    if options:
        raise UserError(f"{path}: no configuration there describes format {fmt!r}")
    files = sorted(p for p in root.iterdir() if p.suffix in SUFFIXES)
    if len(files) == 1:
        return Found(str(root), tuple(files))
    raise UserError(
        f"{path}: holds neither {SPEC_FILE} (uta-jax, UTA), config.json (Hugging Face, timm) nor "
        f"{OPEN_CLIP_CONFIG}, nor a single file of weights"
    )


def _configured(root: Path) -> list[tuple[tuple[Path, ...], Any]]:
    """(weights, reader of format and specification) of each configuration in a directory."""

    def hugging_face() -> tuple[str, ClipSpec]:
        spec = hf_spec(root)
        return hf_format(spec), spec

    options, config = [], root / "config.json"
    values = read_json(config) if config.is_file() else None
    named = (root / OPEN_CLIP_CONFIG).is_file()
    if values is not None and "architecture" not in values:
        if str(values.get("model_type")) in HF_FORMATS or not named:
            options.append((_weights(root, PLAIN_FILES), hugging_face))
    if named:
        spec = (_weights(root, OPEN_CLIP_FILES), lambda: open_clip_spec(root / OPEN_CLIP_CONFIG))
        options.append(spec)
    if values is not None and "architecture" in values:
        options.append((_weights(root, PLAIN_FILES), lambda: timm_spec(root)))
    return options


def _weights(root: Path, names: tuple[str, ...]) -> tuple[Path, ...]:
    """The first of these files that is there, whole or in shards; else the first."""
    for name in names:
        if (root / name).is_file():
            return (root / name,)
        if (index := root / f"{name}.index.json").is_file():
            return _shards(index)
    return (root / names[0],)


def _shards(index: Path) -> tuple[Path, ...]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{index}: has no weight_map")
    return tuple(index.parent / name for name in sorted({_plain(x, index) for x in names.values()}))


def _plain(name: Any, where: Path) -> str:
    """A file name out of a JSON file: it may not lead out of the directory."""
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
        raise UserError(f"{where}: {name!r} is not a file name")
    return name


def _from_record(record: Path, weights: tuple[Path, ...] = ()) -> Found:
    values = read_json(record)
    fmt = values.get("format")
    if not isinstance(fmt, str) or fmt not in FORMATS:
        raise UserError(f"{record}: format={fmt!r} must be one of: {', '.join(FORMATS)}")
    name = values.get("weights", WEIGHTS_FILE)
    weights = weights or (record.parent / _plain(name, record),)
    spec = spec_from_json(values.get("spec"), str(record))
    if spec.tokenizer not in (known := ("clip", *TOKENIZER_FILES)):
        raise UserError(
            f"{record}: tokenizer={spec.tokenizer!r} must be one of: {', '.join(known)}"
        )
    digest = values.get("sha256") or ""
    return Found(str(record.parent), weights, fmt, spec, str(digest), _provenance(values))


def _provenance(record: Mapping[str, Any]) -> dict[str, str] | None:
    """Where converted weights once came from, if the record says all of it."""
    source = record.get("source")
    names = ("name", "format", "sha256")
    whole = isinstance(source, dict) and all(isinstance(source.get(x), str) for x in names)
    return {name: source[name] for name in names} if whole else None


def _find_file(path: Path) -> Found:
    if path.name.endswith(".index.json"):
        files = _shards(path)
    elif path.suffix in SUFFIXES:
        files = (path,)
    else:
        raise UserError(f"{path}: give a directory or a file ending in {', '.join(SUFFIXES)}")
    for record in (path.with_suffix(".json"), path.parent / SPEC_FILE):
        if record.is_file() and record != path:
            return _from_record(record, files)
    options = _configured(path.parent)
    beside = [read for weights, read in options if weights == files]
    if not beside and len(options) == 1 and _is_models(path.parent):
        beside = [options[0][1]]  # a copy under another name
    if not beside:
        return Found(str(path), files)
    fmt, spec = beside[0]()
    return Found(str(path), files, fmt, spec)


def _is_models(root: Path) -> bool:
    """Whether the configuration in a directory is a model's: runs have a config.json, too."""
    config = root / "config.json"
    values = read_json(config) if config.is_file() else {"architecture": ""}
    return "architecture" in values or str(values.get("model_type")) in HF_FORMATS


# Whose weights are which

# Weights under these names were trained with this activation, whatever a copy's config.json says.
FAMILIES = {"openai/clip-vit-": "quick_gelu", "laion/CLIP-ViT-": "gelu"}


def _check_family(path: str, root: Path, spec: ClipSpec) -> None:
    """Refuse a configuration whose activation cannot be that of the named weights."""
    config = read_json(root / "config.json") if (root / "config.json").is_file() else {}
    for name in (path.removeprefix("hf-hub:"), str(config.get("_name_or_path", ""))):
        for family, act in FAMILIES.items():
            others = {tower.act for tower in (spec.vision, spec.text) if tower} - {act}
            if name.startswith(family) and others:
                raise UserError(
                    f"{path}: its configuration says {min(others)!r}, but {name} was trained "
                    f"with {act!r}: correct the activation in its configuration file"
                )


def _check_preset(found: Found, preset: str) -> None:
    """Refuse a preset whose towers are not those of the configuration."""
    spec = found.spec
    options = [
        replace(option, vision=resized(option.vision, spec.vision.image_size))
        for option in PRESETS[preset]
        if (option.text is None) == (spec.text is None)
    ]
    told = [_differences(option, spec) for option in options] or ["it is another kind of model"]
    if all(told):
        raise UserError(f"{found.where}: is not preset {preset!r} by its configuration: {told[0]}")


def _differences(preset: ClipSpec, spec: ClipSpec) -> str:
    pairs = [("vision", preset.vision, spec.vision)]
    pairs += [("text", preset.text, spec.text)] if spec.text else []
    return ", ".join(
        f"{tower}.{name} {theirs[name]!r} (preset: {value!r})"
        for tower, a, b in pairs
        for theirs in (asdict(b),)
        for name, value in asdict(a).items()
        if theirs[name] != value
    )


# By names and shapes


def identify(found: Found, preset: str = "") -> tuple[Found, dict[str, Tensor]]:
    """``found`` with format and specification, and its tensors, opened but not read."""
    tensors = open_weights(*found.weights)
    if found.spec is None:
        fmt, spec = spec_of(found.where, tensors, found.fmt, preset)
        found = replace(found, fmt=fmt, spec=spec)
    return found, tensors


def spec_of(
    where: str, tensors: Mapping[str, Tensor], fmt: str = "", preset: str = ""
) -> tuple[str, ClipSpec]:
    """The one format and specification, among the tables and presets, of tensors of these shapes.

    Raises UserError where there is none, naming the nearest, or several, naming all.
    """
    formats = [fmt] if fmt else [name for name in FORMATS if _has_names(name, tensors)]
    if not formats:
        raise UserError(
            f"{where}: its tensors are named as in no format that is read: the nearest is "
            f"{_nearest_format(tensors)!r}; `--check --format NAME` lists what is missing"
        )
    options: dict[tuple[str, ClipSpec], str] = {}
    for kind in formats:
        for name in [preset] if preset else PRESETS:
            for spec in _fitting(kind, PRESETS[name], tensors):
                options.setdefault((kind, spec), name)
    if preset and not options:  # name all that is wrong with it
        translate.check_tensors(formats[0], PRESETS[preset][0], tensors)
    if not options:
        raise UserError(f"{where}: {_unknown(formats[0], tensors)}")
    if len(options) > 1:
        names = " or ".join(
            f"--preset {name} ({kind}, {spec.vision.act})" for (kind, spec), name in options.items()
        )
        raise UserError(
            f"{where}: its shapes fit several models, which give other features, and no "
            f"configuration says which it is: choose {names}"
        )
    return next(iter(options))


def _has_names(fmt: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether every tensor that each model of the format has is there, of the first block."""
    rows = FORMATS[fmt].rows
    return bool(rows) and all(x.optional or x.theirs.format(i=0) in tensors for x in rows)


def _nearest_format(tensors: Mapping[str, Tensor]) -> str:
    def share(fmt: str) -> float:
        names = [row.theirs.format(i=0) for row in FORMATS[fmt].rows if not row.optional]
        return sum(name in tensors for name in names) / max(1, len(names))

    return max(FORMATS, key=share)


def _sizes(fmt: str, tensors: Mapping[str, Tensor]) -> tuple[int, int, int, int]:
    """Of the vision tower: width, patch size, depth, and how many positions it has learned."""
    rows = {path: row.theirs for row in FORMATS[fmt].rows for path in row.paths}
    kernel = tensors[rows["vision/patch_embed/kernel"]].shape
    width, patch = kernel[0], kernel[-1]
    depth = 0
    while rows["vision/blocks/norm1/scale"].format(i=depth) in tensors:
        depth += 1
    return width, patch, depth, prod(tensors[rows["vision/pos_embed"]].shape) // max(1, width)


def _fitting(fmt: str, presets: tuple[ClipSpec, ...], tensors: Mapping[str, Tensor]):
    """Those of ``presets``, at the resolution of the stored positions, that ``tensors`` are of."""
    width, patch, depth, positions = _sizes(fmt, tensors)
    found = {name: tuple(x.shape) for name, x in tensors.items()}
    for spec in presets:
        vision = spec.vision
        grid = isqrt(max(0, positions - vision.cls))
        if (vision.width, vision.patch_size, vision.depth) != (width, patch, depth) or not grid:
            continue
        spec = with_vision(spec, resized(vision, grid * patch))
        if translate.misfits(fmt, spec):
            continue
        extras = translate.dropped(fmt, spec, tensors)
        shapes = translate.their_shapes(fmt, spec)
        if shapes == {name: shape for name, shape in found.items() if name not in extras}:
            yield spec


def _unknown(fmt: str, tensors: Mapping[str, Tensor]) -> str:
    width, patch, depth, _ = _sizes(fmt, tensors)

    def distance(vision: VitSpec) -> float:
        pairs = ((width, vision.width), (depth, vision.depth), (patch, vision.patch_size))
        return sum(abs(found - known) / known for found, known in pairs)

    def held(vision: VitSpec) -> bool:
        return all(getattr(vision, k) in allowed for k, allowed in FORMATS[fmt].vision.items())

    known = {name: specs[0].vision for name, specs in PRESETS.items() if held(specs[0].vision)}
    nearest = min(known, key=lambda name: distance(known[name]))
    return (
        f"no known architecture of format {fmt!r} (width {width}, depth {depth}, patch size "
        f"{patch}); the nearest is {nearest!r}: `--check --preset {nearest}` lists what differs, "
        f"a {SPEC_FILE} beside it describes any other"
    )
