"""What lies at a path: by its configuration, else by the names and shapes of its tensors; hubs."""

import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from interop_models import (
    CLIP_SPEC,
    UTA_SPEC,
    assert_equal_trees,
    edit_json,
    random_params,
    write_model,
)
from safetensors.numpy import load_file, save_file

from uta_jax import UserError
from uta_jax.interop import find, translate
from uta_jax.interop.files import write_json, write_safetensors
from uta_jax.interop.keymaps import FORMATS
from uta_jax.interop.teacher import load_clip, read_spec
from uta_jax.models.presets import CLIP, VIT, ClipSpec, resized


def shapes_alone(fmt, spec):
    """Tensors as wide as the real ones that take no memory."""
    shapes = translate.their_shapes(fmt, spec)
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("fmt", "preset"),
    [
        ("uta", "uta_l14_336"),
        ("eva_clip02", "eva02_b16"),
        ("eva_clip01", "eva01_g14"),
        ("eva_clip01", "eva01_g14_plus"),
        ("open_clip_eva02", "eva02_l14_336"),
        ("open_clip", "clip_h14_gelu"),
    ],
)
def test_weights_alone_tell_format_and_preset(fmt, preset):
    spec = CLIP[preset]
    assert find.spec_of("x", shapes_alone(fmt, spec)) == (fmt, spec)


@pytest.mark.parametrize("fmt", ["hf_dinov2", "timm_vit"])
def test_a_tower_alone_has_the_pixels_of_its_family(fmt):
    spec = ClipSpec(VIT["dinov2_s14"], None)
    _, dinov2 = find.spec_of("x", shapes_alone(fmt, spec))
    assert dinov2.mean == (0.485, 0.456, 0.406) and dinov2.std == (0.229, 0.224, 0.225)
    assert dinov2.resize_size == 592 and dinov2.vision == spec.vision
    tensors = shapes_alone("timm_vit", ClipSpec(CLIP["siglip_b16"].vision, None))
    _, siglip = find.spec_of("x", tensors, preset="siglip_b16_gelu")
    assert siglip.mean == siglip.std == (0.5, 0.5, 0.5) and siglip.resize == "squash"
    assert siglip.text is None and siglip.vision.act == "gelu" and not siglip.logit_bias


def test_at_another_resolution():
    spec = replace(CLIP["eva02_b16"], vision=resized(CLIP["eva02_b16"].vision, 384))
    assert find.spec_of("x", shapes_alone("eva_clip02", spec)) == ("eva_clip02", spec)


@pytest.mark.parametrize(
    ("fmt", "name"),
    [
        *((fmt, "clip_b16") for fmt in ("hf_clip", "open_clip", "open_clip_text")),
        *((fmt, "siglip_b16") for fmt in ("hf_siglip", "open_clip_siglip")),
        *((fmt, "siglip2_b16") for fmt in ("hf_siglip", "open_clip_siglip")),
    ],
)
def test_activations_that_shapes_do_not_tell_must_be_chosen(fmt, name):
    tensors = shapes_alone(fmt, CLIP[name])
    with pytest.raises(UserError, match=f"--preset {name} .* or --preset {name}_gelu"):
        find.spec_of("x", tensors)
    for preset in (name, f"{name}_gelu"):
        assert find.spec_of("x", tensors, preset=preset) == (fmt, CLIP[preset])


def test_another_preset_lists_what_differs():
    tensors = shapes_alone("uta", CLIP["uta_b16"])
    with pytest.raises(
        UserError,
        match=r"missing: visual.blocks.{12-23}.attn.k_proj.weight \(1024, 1024\), .*; misshaped: ",
    ):
        find.spec_of("x", tensors, preset="uta_l14_336")


def test_unknown_architecture_names_the_nearest():
    spec = replace(CLIP["eva02_b16"], vision=replace(CLIP["eva02_b16"].vision, depth=11))
    with pytest.raises(UserError, match="width 768, depth 11.*nearest is 'eva02_b16'"):
        find.spec_of("x", shapes_alone("eva_clip02", spec))


def test_no_two_formats_share_their_names():
    """Else the names of a file would not tell which it is. UTA is EVA-02 without its norm."""
    for fmt, table in FORMATS.items():
        names = {row.theirs.format(i=0): None for row in table.rows}
        told = {name for name in FORMATS if find._has_names(name, names)}
        known = {
            "eva_clip02": {"uta"},
            "timm_vit": {"timm_vit_swiglu"},  # one matrix of twice the size
            "timm_vit_swiglu": {"timm_vit"},
        }
        assert told - {fmt} <= known.get(fmt, set()), fmt


# Directories


def test_the_format_chooses_among_several_configurations(tmp_path):
    """A repository of open_clip's, with the same model for transformers."""
    open_clip_config = pytest.importorskip("uta_jax.interop.open_clip_config")
    spec = replace(CLIP_SPEC, vision=replace(CLIP_SPEC.vision, mlp_hidden=64, heads=2))
    spec = replace(spec, text=replace(spec.text, mlp_hidden=48))
    root, params = write_model(tmp_path / "x", "hf_clip"), random_params(spec, seed=1)
    tensors = translate.to_theirs("open_clip", spec, params)
    write_safetensors(root / "open_clip_model.safetensors", tensors)
    for name, values in open_clip_config.open_clip_configs("open_clip", spec).items():
        write_json(root / name, values)
    assert read_spec(root) == CLIP_SPEC
    assert_equal_trees(load_clip(root, fmt="open_clip").params, params)
    with pytest.raises(UserError, match="no configuration there describes format 'uta'"):
        load_clip(root, fmt="uta")
    (root / "model.safetensors").unlink()
    assert read_spec(root) == spec
    assert read_spec(root / "open_clip_model.safetensors") == spec


def test_a_file_is_read_by_the_configuration_beside_it(tmp_path):
    root = write_model(tmp_path / "hf", "hf_clip")
    assert read_spec(root / "model.safetensors") == CLIP_SPEC
    names = dict.fromkeys(load_file(root / "model.safetensors"), "model.safetensors")
    write_json(root / "model.safetensors.index.json", {"weight_map": names})
    assert read_spec(root / "model.safetensors.index.json") == CLIP_SPEC
    (root / "model.safetensors").rename(root / "copy.safetensors")
    assert read_spec(root / "copy.safetensors") == CLIP_SPEC
    write_json(root / "config.json", {"objective": "uta"})  # no model's: of a run, say
    with pytest.raises(UserError, match="no known architecture of format 'hf_clip'"):
        read_spec(root / "copy.safetensors")


def test_a_configuration_at_odds_with_what_was_asked(tmp_path):
    root = write_model(tmp_path / "hf", "hf_clip")
    with pytest.raises(UserError, match="is 'hf_clip' by its configuration, not 'uta'"):
        load_clip(root, fmt="uta")
    with pytest.raises(UserError, match="format='hf' must be one of: hf_clip"):
        load_clip(root, fmt="hf")
    with pytest.raises(UserError, match="preset='clip_b17' .* nearest is 'clip_b1"):
        load_clip(root, preset="clip_b17")


# QuickGELU or GELU


def say_act(root, act, name=""):
    write_json(root / "config.json", {
        "model_type": "clip", "projection_dim": 20, "_name_or_path": name,
        "vision_config": {"hidden_act": act}, "text_config": {"hidden_act": act},
    })  # fmt: skip


@pytest.mark.parametrize(
    ("name", "act", "trained"),
    [
        ("openai/clip-vit-base-patch32", "gelu", "quick_gelu"),
        ("laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "quick_gelu", "gelu"),
    ],
)
def test_activation_of_a_known_family(tmp_path, name, act, trained):
    say_act(tmp_path, trained, name)
    (tmp_path / "model.safetensors").touch()
    assert read_spec(tmp_path).vision.act == trained
    for towers in (("vision_config", "text_config"), ("text_config",)):
        say_act(tmp_path, trained, name)
        edit_json(tmp_path / "config.json", **{x: {"hidden_act": act} for x in towers})
        with pytest.raises(UserError, match=f"says '{act}', but {name} was trained with"):
            read_spec(tmp_path)


def test_activation_of_a_preset(tmp_path):
    say_act(tmp_path, "gelu")
    expected = "vision.act 'gelu' .preset: 'quick_gelu'., text.act 'gelu'"
    config = {"projection_dim": 512, "model_type": "clip"}
    towers = {x: {"hidden_act": "gelu"} for x in ("vision_config", "text_config")}
    write_json(tmp_path / "config.json", config | towers)
    (tmp_path / "model.safetensors").touch()
    assert read_spec(tmp_path, preset="clip_b32_gelu") == CLIP["clip_b32_gelu"]
    with pytest.raises(UserError, match=expected):
        read_spec(tmp_path, preset="clip_b32")


def test_activation_of_an_open_clip_tag(no_network):
    pytest.importorskip("open_clip")
    with pytest.raises(UserError, match="QuickGELU .* name open_clip:ViT-B-16-quickgelu/openai"):
        load_clip("open_clip:ViT-B-16/openai")


# Hubs


@pytest.fixture
def no_network(tmp_path, monkeypatch):
    """An empty cache, and a client that may not ask anyone."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def cached(cache, repo, revision="main"):
    """An empty snapshot of a repository, laid out as the hub's client does."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    home = cache / f"models--{repo.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / revision).write_text(commit)
    (home / "snapshots").mkdir()
    (home / "blobs").mkdir()
    return home / "snapshots" / commit


def as_links(snapshot):
    """The client stores files under their hashes, and links to them."""
    for i, path in enumerate(sorted(snapshot.iterdir())):
        blob = snapshot.parents[1] / "blobs" / f"{i:040x}"
        path.rename(blob)
        path.symlink_to(os.path.relpath(blob, snapshot))


@pytest.mark.parametrize("revision", ["main", "v2"])
def test_a_cached_repository(no_network, revision):
    snapshot = cached(no_network, "someone/model", revision)
    write_model(snapshot, "hf_clip")
    as_links(snapshot)
    name = "hf-hub:someone/model" + (f"@{revision}" if revision != "main" else "")
    clip = load_clip(name)
    assert clip.spec == CLIP_SPEC
    assert clip.provenance["name"] == f"hf-hub:someone/model@{snapshot.name}"
    assert_equal_trees(clip.params, random_params(CLIP_SPEC))


def test_a_partly_cached_repository(no_network, monkeypatch, capsys):
    """transformers' AutoModel leaves the weights there, and not how images are prepared."""
    import huggingface_hub

    snapshot = write_model(cached(no_network, "someone/model"), "hf_clip")
    rest = (snapshot / "preprocessor_config.json").read_text()
    (snapshot / "preprocessor_config.json").unlink()
    assert load_clip("hf-hub:someone/model").spec.mean != CLIP_SPEC.mean
    assert "no preprocessor_config.json there" in capsys.readouterr().err

    def download(repo_id, revision, allow_patterns):
        assert repo_id == "someone/model" and "*.json" in allow_patterns
        (snapshot / "preprocessor_config.json").write_text(rest)
        return snapshot

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load_clip("hf-hub:someone/model").spec == CLIP_SPEC
    assert not capsys.readouterr().err


def test_a_cached_open_clip_tag(no_network, monkeypatch):
    """Architecture and image statistics come from open_clip's tables, weights from the cache."""
    open_clip = pytest.importorskip("open_clip")
    config = {
        "embed_dim": 20,
        "vision_cfg": {"image_size": 24, "layers": 3, "width": 32, "patch_size": 8,
                       "head_width": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 24, "heads": 3, "layers": 2},
    }  # fmt: skip
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: config)
    snapshot = cached(no_network, "laion/CLIP-ViT-B-16-laion2B-s34B-b88K")
    snapshot.mkdir()
    vision = replace(CLIP_SPEC.vision, mlp_hidden=128, act="gelu")
    spec = ClipSpec(vision, replace(CLIP_SPEC.text, mlp_hidden=96, act="gelu"))
    params = random_params(spec)
    tensors = translate.to_theirs("open_clip", spec, params)
    write_safetensors(snapshot / "open_clip_model.safetensors", tensors)
    as_links(snapshot)
    clip = load_clip("open_clip:ViT-B-16/laion2b_s34b_b88k")
    assert clip.spec == spec
    assert_equal_trees(clip.params, params)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf-hub:someone/else", "not in the cache .* run `hf download someone/else`"),
        ("hf-hub:someone/model", "not in the cache .* run `hf download someone/model`"),
        ("hf-hub:a/b/c", "no name of a model"),
        ("hf-hub:../../etc", "no name of a model"),
        ("open_clip:ViT-B-16/laion2b_s34b_b88k", "not in the cache .* `hf download laion/CLIP-ViT"),
        ("open_clip:ViT-B-16/laion2b", "nearest is ViT-B-16, with openai, .*, laion2b_s34b_b88k"),
        ("open_clip:nonsense", "not in open_clip's table; the nearest is "),
    ],
)
def test_what_is_not_there(no_network, name, message):
    if name.startswith("open_clip"):
        pytest.importorskip("open_clip")
    cached(no_network, "someone/model").mkdir()  # an interrupted download
    with pytest.raises(UserError, match=message) as error:
        load_clip(name)
    assert "\n" not in str(error.value)


def test_the_cache_that_the_environment_names(tmp_path):
    write_model(cached(tmp_path / "hub", "someone/model"), "uta")
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    command = [sys.executable, "-m", "uta_jax", "convert", "hf-hub:someone/model", tmp_path / "x"]
    subprocess.run(command, env=environment, check=True, cwd=Path(__file__).parents[1])
    assert load_clip(tmp_path / "x").spec == UTA_SPEC


# Wrong paths


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", "no such file or directory"),
        ("x" * 300, "no such file or directory"),
        ("empty", "neither spec.json .*, config.json .* nor open_clip_config.json"),
        ("asset:nothing", "no such asset"),
        ("notes.txt", "give a directory or a file ending in"),
        ("other.safetensors", "in no format that is read: the nearest is "),
        ("broken/config.json", "give a directory"),
        ("broken", "not a readable JSON file"),
        ("deep", "not a readable JSON file"),
        ("kind", r"format=\[\] must be one of"),
        ("timm", "nearest is 'vit_base_patch16_224'"),
        ("both", "model_type 'bert' is not supported; the nearest is"),
    ],
)
def test_wrong_paths(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "broken", "timm", "both", "deep", "kind"):
        Path(folder).mkdir()
    Path("notes.txt").touch()
    Path("broken/config.json").write_text("{")
    Path("deep/spec.json").write_text("[" * 300_000)
    write_json(Path("kind/spec.json"), {"format": []})
    write_json(Path("timm/config.json"), {"architecture": "vit_base_patch16_225"})
    write_json(Path("both/config.json"), {"model_type": "bert"})
    save_file({"a": np.ones(2)}, "other.safetensors")
    with pytest.raises(UserError, match=message):
        load_clip(path)


def test_a_record_of_any_format(tmp_path):
    root = write_model(tmp_path / "hf", "hf_clip")
    (root / "config.json").unlink()
    record = {"format": "hf_clip", "weights": "model.safetensors", "spec": asdict(CLIP_SPEC)}
    write_json(root / "spec.json", record)
    assert_equal_trees(load_clip(root).params, random_params(CLIP_SPEC))
