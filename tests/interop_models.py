"""What the tests of interop share: two small architectures, random weights, their directories."""

import json
from dataclasses import replace

import numpy as np

from uta_jax.interop import translate
from uta_jax.interop.files import write_json, write_safetensors
from uta_jax.interop.hf_config import hf_configs
from uta_jax.interop.teacher import write_recorded
from uta_jax.models.presets import ClipSpec, TextSpec, VitSpec

TEXT = TextSpec(8, 50, 24, 2, 3, 40, 20, act="gelu")
CLIP_SPEC = ClipSpec(
    VitSpec(
        24, 8, 32, 3, 4, 56, 20, act="quick_gelu", ln_eps=1e-5, embed_norm=True, patch_bias=False
    ),
    replace(TEXT, act="quick_gelu"),
    mean=(0.4, 0.5, 0.6),
    std=(0.2, 0.25, 0.3),
)
UTA_SPEC = ClipSpec(
    VitSpec(
        24, 8, 32, 3, 4, 56, 20,
        act="swiglu", qkv_bias="qv", mlp_norm=True, head_bias=True, rope_theta=10000.0,
    ),
    TEXT,
)  # fmt: skip
SPECS = {"hf_clip": CLIP_SPEC, "uta": UTA_SPEC}


def random_params(spec, seed=0):
    rng = np.random.default_rng(seed)
    shapes = translate.param_shapes(spec)
    draw = {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
    return translate.unflatten({path: np.asarray(x, np.float32) for path, x in draw.items()})


def assert_equal_trees(a, b):
    a, b = translate.flatten(a), translate.flatten(b)
    assert a.keys() == b.keys()
    for path, x in a.items():
        y = np.asarray(b[path])
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes()), path


def edit_json(path, **changes):
    """Change fields of a JSON file; those of a section keep the others of that section."""
    values = json.loads(path.read_text())
    for key, new in changes.items():
        merge = isinstance(new, dict) and isinstance(values.get(key), dict)
        values[key] = values[key] | new if merge else new
    write_json(path, values)


def write_model(folder, fmt, params=None):
    """A directory of random weights, as transformers or a release of UTA with our JSON."""
    spec = SPECS[fmt]
    tensors = translate.to_theirs(fmt, spec, params or random_params(spec))
    folder.mkdir()
    if fmt == "uta":
        write_recorded(folder, fmt, "uta.safetensors", tensors, spec, {})
        return folder
    write_safetensors(folder / "model.safetensors", tensors)
    for name, values in hf_configs(spec).items():
        write_json(folder / name, values)
    return folder


def files_below(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
