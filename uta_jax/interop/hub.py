"""Names of models on a hub -> files on this disk, through the hub's own client and its cache."""

import sys
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from uta_jax import UserError
from uta_jax.interop.files import read_json

# What a conversion can need, and nothing else: no programs, no other library's weights.
SMALL = ("*.json", "spiece.model", "tokenizer.model")
SAFE = tuple(f"{x}.safetensors" for x in ("model*", "open_clip_model*", "weights", "uta"))
TORCH = ("pytorch_model*.bin", "open_clip_pytorch_model*.bin")


class Tag(NamedTuple):
    """A pre-trained model in open_clip's own table."""

    folder: Path  # the snapshot of its repository
    files: tuple[str, ...]  # where its weights may lie there; empty: under their usual name
    model: dict[str, Any]  # its architecture
    preprocess: dict[str, Any]  # how images are prepared for it


def snapshot(path: str) -> Path:
    """The directory of ``hf-hub:org/name[@revision]``: cached (HF_HOME), else downloaded.

    Weights are downloaded as safetensors; as PyTorch's pickles only where there are no others.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    repo, _, revision = path.removeprefix("hf-hub:").partition("@")
    options = dict(repo_id=repo, revision=revision or None)
    try:
        # What is cached is not downloaded again; what another library left out there, now is.
        folder = Path(snapshot_download(**options, allow_patterns=[*SMALL, *SAFE]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(**options, allow_patterns=[*SMALL, *TORCH]))
        _warn_of_defaults(path, folder)
        return _with_weights(folder)
    except HFValidationError as error:
        raise UserError(f"{path}: no name of a model ({str(error).splitlines()[0]})") from None
    except Exception as error:  # the client's, its HTTP library's, the operating system's
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise UserError(
            f"{path}: not in the cache ({_cache()}), and not downloaded ({type(error).__name__}: "
            f"{reason.rstrip('.')}); where there is a network, run `hf download {repo}` and copy "
            "what it makes there, or convert its directory"
        ) from None


def _warn_of_defaults(path: str, folder: Path) -> None:
    """A cache that another library filled, read without a network, may lack small files."""
    processors = ("preprocessor_config.json", "processor_config.json", "open_clip_config.json")
    config = folder / "config.json"
    if any((folder / name).is_file() for name in processors) or not config.is_file():
        return
    if "architecture" not in read_json(config):  # timm's says how images are prepared
        print(
            f"{path}: no {processors[0]} there: images are prepared as its family's usually are",
            file=sys.stderr,
        )


def _with_weights(folder: Path) -> Path:
    if not any(any(folder.glob(pattern)) for pattern in (*SAFE, *TORCH)):
        raise FileNotFoundError(f"{folder} holds no weights")
    return folder


def _cache() -> str:
    from huggingface_hub import constants

    return constants.HF_HUB_CACHE


def open_clip_tag(path: str) -> Tag:
    """``open_clip:ARCHITECTURE/TAG``, as in open_clip's tables. Needs the torch extra.

    Raises UserError where they have no such entry, or its activation is not the architecture's.
    """
    try:
        import open_clip
        from open_clip.pretrained import get_pretrained_cfg
    except ImportError:
        raise UserError(f"{path}: its table needs `pip install 'uta-jax[torch]'`") from None
    name, _, tag = path.removeprefix("open_clip:").partition("/")
    pretrained, model = get_pretrained_cfg(name, tag), open_clip.get_model_config(name)
    if not pretrained or not model:
        known = open_clip.list_pretrained(as_str=False)
        near = get_close_matches(name, {x for x, _ in known}, 1, cutoff=0.0)[0]
        tags = ", ".join(tag for x, tag in known if x == near)
        raise UserError(f"{path}: not in open_clip's table; the nearest is {near}, with {tags}")
    if bool(pretrained.get("quick_gelu")) != bool(model.get("quick_gelu")):
        raise UserError(
            f"{path}: QuickGELU of weights and architecture differ (weights: "
            f"{bool(pretrained.get('quick_gelu'))}); the features would be wrong: name "
            f"open_clip:{_other_family(name)}/{tag}"
        )
    home = str(pretrained.get("hf_hub") or "").strip("/").split("/")
    if len(home) < 2:
        raise UserError(
            f"{path}: on no hub, only at {pretrained.get('url')!r}: download it and convert the "
            "file"
        )
    keys = ("mean", "std", "interpolation", "resize_mode")
    preprocess = {key: pretrained[key] for key in keys if key in pretrained}
    for key in ("mean", "std"):
        preprocess[key] = list(preprocess.get(key, ())) or None
    preprocess = {key: value for key, value in preprocess.items() if value is not None}
    file = ("/".join(home[2:]),) if home[2:] else ()
    return Tag(snapshot(f"hf-hub:{'/'.join(home[:2])}"), file, model, preprocess)


def _other_family(name: str) -> str:
    quick = "-quickgelu"
    return name.removesuffix(quick) if name.endswith(quick) else name + quick
