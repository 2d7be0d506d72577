"""What is found in the place of weights, and what happens while they are written.

Each fault: one line of its own, exit status 2, nothing in or beside DST, and proof of the fault.
"""

import os
import pickle
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from interop_models import (
    CLIP_SPEC,
    assert_equal_trees,
    edit_json,
    random_params,
    write_model,
)
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from uta_jax.__main__ import main
from uta_jax.interop import translate
from uta_jax.interop.files import WRITTEN, open_weights
from uta_jax.interop.teacher import convert, load_clip

WEIGHTS = "model.safetensors"


@pytest.fixture
def hf_dir(tmp_path):
    return write_model(tmp_path / "hf", "hf_clip")


@pytest.fixture
def refused(tmp_path, capsys):
    """Convert ``src`` in vain; the one line that says why."""

    def convert_in_vain(src, *options):
        before = sorted(tmp_path.iterdir())
        assert main(["convert", str(src), str(tmp_path / "dst"), *options]) == 2
        assert sorted(tmp_path.iterdir()) == before, "something was left behind"
        told = capsys.readouterr()
        assert told.err.count("\n") == 1 and not told.out
        return told.err

    return convert_in_vain


# Not weights at all


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"\0" * 4096, "begins with zeros"),
        (b"<!DOCTYPE html><html>Not found</html>", "an HTML page, not weights"),
        (b"\n<html lang=en>", "an HTML page, not weights"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a git-lfs pointer"),
        (b"\xff" * 64, "truncated or damaged safetensors file"),
        (b'\x10\0\0\0\0\0\0\0{"a":', "truncated or damaged safetensors file"),
    ],
)
@pytest.mark.parametrize("name", [WEIGHTS, "pytorch_model.bin"])
def test_no_weights(hf_dir, refused, content, message, name):
    (hf_dir / WEIGHTS).unlink()
    (hf_dir / name).write_bytes(content)
    if name.endswith(".bin"):
        pytest.importorskip("torch")
        message = message.replace(" safetensors file", "")
    assert f"{hf_dir / name}: {message}" in refused(hf_dir)


@pytest.mark.parametrize("kept", [0.999, 0.5, 0.01])
def test_a_truncated_file(hf_dir, refused, kept):
    data = (hf_dir / WEIGHTS).read_bytes()
    (hf_dir / WEIGHTS).write_bytes(data[: int(len(data) * kept)])
    assert "truncated or damaged" in refused(hf_dir)


def test_a_file_that_shrinks_while_it_is_read(hf_dir, refused, monkeypatch):
    from uta_jax.interop import teacher

    def open_then_cut(*args):
        found = identify(*args)
        os.truncate(hf_dir / WEIGHTS, 5000)
        return found

    identify = teacher.identify
    monkeypatch.setattr(teacher, "identify", open_then_cut)
    assert f"{hf_dir / WEIGHTS}: ends before its last tensor does" in refused(hf_dir)
    assert (hf_dir / WEIGHTS).stat().st_size == 5000


# PyTorch's pickles


class Evil:
    """Writes a file when unpickled."""

    def __reduce__(self):
        return os.system, ("touch executed",)


def torch_file(path, content, **options):
    torch = pytest.importorskip("torch")
    torch.save(content, path, **options)
    return path


def test_the_pickle_would_execute(tmp_path, monkeypatch):
    """Else the tests below prove nothing."""
    monkeypatch.chdir(tmp_path)
    function, arguments = Evil().__reduce__()  # what unpickling calls
    function(*arguments)
    assert Path("executed").exists()


@pytest.mark.parametrize("container", ["zip", "before 1.6", "bare"])
@pytest.mark.parametrize("suffix", [".pt", ".bin", ".pth"])
def test_code_in_a_pickle_is_never_executed(tmp_path, monkeypatch, refused, container, suffix):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"x{suffix}"
    if container == "bare":
        pytest.importorskip("torch")
        path.write_bytes(pickle.dumps({"a": Evil()}, protocol=2))
    else:
        torch_file(path, {"a": Evil()}, _use_new_zipfile_serialization=container == "zip")
    assert "pickled Python objects (posix.system), which could run any code" in refused(path)
    assert not Path("executed").exists()


def test_a_pickled_namespace(tmp_path, refused):
    torch = pytest.importorskip("torch")
    path = torch_file(tmp_path / "x.pt", {"args": Namespace(lr=1), "model": {"a": torch.ones(2)}})
    assert "holds pickled arguments (argparse.Namespace)" in refused(path)


def test_other_pickles(tmp_path, refused):
    assert "holds no state dict" in refused(torch_file(tmp_path / "x.pt", [1, 2]))
    assert "holds no state dict" in refused(torch_file(tmp_path / "x.pt", {"epoch": 3}))


def test_a_truncated_pickle(tmp_path, refused):
    torch = pytest.importorskip("torch")
    for zipped in (True, False):
        path = tmp_path / "x.pt"
        torch_file(path, {"a": torch.ones(999)}, _use_new_zipfile_serialization=zipped)
        path.write_bytes(path.read_bytes()[:-700])
        assert "x.pt: truncated" in refused(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_pickle(tmp_path, refused, zipped):
    torch = pytest.importorskip("torch")
    path = torch_file(
        tmp_path / "x.pt", {"a": torch.ones(3)}, _use_new_zipfile_serialization=zipped
    )
    data = path.read_bytes()
    start = data.rindex(b"\x80\x02}") + 2  # the pickle of the state dict, after its protocol
    for code in (b".", b"R"):  # what takes from an empty stack
        path.write_bytes(data[:start] + code + data[start + 1 :])
        assert "no weights file (IndexError: pop from empty list)" in refused(path)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_program(tmp_path, refused):
    """OpenAI's own files are TorchScript."""
    torch = pytest.importorskip("torch")
    torch.jit.script(torch.nn.Linear(2, 3)).save(tmp_path / "x.pt")
    assert "a TorchScript archive, which is a program" in refused(tmp_path / "x.pt")


def state_dict():
    torch = pytest.importorskip("torch")
    theirs = translate.to_theirs("hf_clip", CLIP_SPEC, random_params(CLIP_SPEC))
    return {name: torch.from_numpy(x) for name, x in theirs.items()}


def prefixed(state):
    return {f"module.{name}": x for name, x in state.items()}


WRAPPED = {
    "bare": lambda state: state,
    "prefix": prefixed,
    "state_dict": lambda state: {"epoch": 3, "state_dict": prefixed(state)},
    "module": lambda state: {"module": state, "lr": 1e-3},
    "model": lambda state: {"model": state, "optimizer": {"step": 5, "state": {}}},
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("how", WRAPPED)
def test_what_training_scripts_save(hf_dir, tmp_path, how, zipped):
    content = WRAPPED[how](state_dict())
    path = hf_dir / "pytorch_model.bin"
    torch_file(path, content, _use_new_zipfile_serialization=zipped)
    (hf_dir / WEIGHTS).unlink()
    convert(hf_dir, tmp_path / "dst")
    assert_equal_trees(load_clip(tmp_path / "dst").params, random_params(CLIP_SPEC))


def test_prefixed_safetensors(hf_dir):
    tensors = load_file(hf_dir / WEIGHTS)
    save_file(prefixed(tensors), hf_dir / WEIGHTS)
    assert all(name.startswith("module.") for name in load_file(hf_dir / WEIGHTS))
    assert_equal_trees(load_clip(hf_dir).params, random_params(CLIP_SPEC))


# Values


@pytest.mark.parametrize("zipped", [True, False])
def test_tied_and_transposed_tensors(hf_dir, zipped):
    """Two names of one storage, and one that is not in C order."""
    state, name = state_dict(), "vision_model.encoder.layers.1.mlp.fc1.weight"
    state[name] = state[name].T.contiguous().T
    state["vision_model.post_layernorm.weight"] = state["vision_model.pre_layrnorm.weight"]
    path = torch_file(hf_dir / "x.pt", state, _use_new_zipfile_serialization=zipped)
    tensors = open_weights(path)
    assert not zipped or tensors[name].strides == (1, 56)
    clip = translate.to_ours("hf_clip", CLIP_SPEC, tensors)
    want = random_params(CLIP_SPEC)
    want["vision"]["head"]["norm"]["scale"] = want["vision"]["embed_norm"]["scale"]
    assert_equal_trees(clip, want)


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_bfloat16(hf_dir, tmp_path, kind):
    half = {k: x.astype(ml_dtypes.bfloat16) for k, x in load_file(hf_dir / WEIGHTS).items()}
    if kind == "pt":
        (hf_dir / WEIGHTS).unlink()
        state = {name: x.bfloat16() for name, x in state_dict().items()}
        torch_file(hf_dir / "pytorch_model.bin", state)
    else:
        save_file(half, hf_dir / WEIGHTS)
        with safe_open(hf_dir / WEIGHTS, "numpy") as file:
            assert file.get_slice("logit_scale").get_dtype() == "BF16"
    convert(hf_dir, tmp_path / "dst")
    scale = load_clip(tmp_path / "dst").params["vision"]["embed_norm"]["scale"]
    assert scale.dtype == np.float32
    np.testing.assert_array_equal(scale, half["vision_model.pre_layrnorm.weight"])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite(hf_dir, refused, value):
    tensors = load_file(hf_dir / WEIGHTS)
    for name in ("visual_projection.weight", "text_model.encoder.layers.1.mlp.fc1.bias"):
        tensors[name].reshape(-1)[7] = value
    save_file(tensors, hf_dir / WEIGHTS)
    assert (
        "NaN or infinity in text_model.encoder.layers.1.mlp.fc1.bias, visual_projection.weight"
        in refused(hf_dir)
    )


def test_too_large_for_float32(hf_dir, refused):
    tensors = load_file(hf_dir / WEIGHTS)
    tensors["logit_scale"] = np.full((), 1e300)
    save_file(tensors, hf_dir / WEIGHTS)
    assert np.isfinite(load_file(hf_dir / WEIGHTS)["logit_scale"])
    assert "NaN or infinity in logit_scale" in refused(hf_dir)


# Another model than it says


def test_missing_and_extra_keys(hf_dir, refused):
    tensors = load_file(hf_dir / WEIGHTS)
    for layer in range(3):
        del tensors[f"vision_model.encoder.layers.{layer}.layer_norm1.bias"]
    tensors["a"] = tensors["b"] = np.ones(2, np.float32)
    tensors["logit_scale"] = np.ones(3, np.float32)
    save_file(tensors, hf_dir / WEIGHTS)
    assert (
        "6 keys do not match: missing: vision_model.encoder.layers.{0-2}.layer_norm1.bias (32,); "
        "unexpected: a (2,), b (2,); misshaped: logit_scale (3,) for ()" in refused(hf_dir)
    )


def test_unknown_architecture(hf_dir, refused):
    edit_json(hf_dir / "config.json", model_type="cliq")
    assert "model_type 'cliq' is not supported; the nearest is 'clip'" in refused(hf_dir)
    (hf_dir / "config.json").unlink()
    assert "no known architecture of format 'hf_clip' (width 32, depth 3" in refused(hf_dir)


def test_quick_gelu_of_another_family(hf_dir, refused):
    edit_json(hf_dir / "config.json", _name_or_path="laion/CLIP-ViT-B-32-laion2B-s34B-b79K")
    assert "was trained with 'gelu'" in refused(hf_dir)
    edit_json(hf_dir / "config.json", _name_or_path="")
    assert "vision.act" not in refused(hf_dir, "--preset=tiny_clip")


def test_another_file_than_was_meant(hf_dir, refused):
    assert f"not the {'0' * 64} wanted" in refused(hf_dir, f"--sha256={'0' * 64}")


def test_one_flipped_bit_in_our_own_file(hf_dir, tmp_path, refused):
    convert(hf_dir, tmp_path / "ours")
    path = tmp_path / "ours" / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-5000] ^= 1
    path.write_bytes(data)
    assert "weights are damaged" in refused(tmp_path / "ours")


# Writing


def test_an_existing_directory(hf_dir, tmp_path, capsys):
    (tmp_path / "dst").mkdir()
    assert main(["convert", str(hf_dir), str(tmp_path / "dst")]) == 2
    assert "dst: already exists; remove it or ask for overwrite" in capsys.readouterr().err
    assert main(["convert", str(hf_dir), str(tmp_path / "dst"), "--overwrite"]) == 0
    assert {p.name for p in (tmp_path / "dst").iterdir()} <= WRITTEN


def test_a_file_in_the_way(hf_dir, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "dead").symlink_to(tmp_path / "nowhere")
    for dst, message in (
        ("file", "is a file"),
        ("file/dst", "cannot be written"),
        ("dead", "is a file or a dead link"),
        ("x" * 300, "cannot be written"),
        ("a\0b", "cannot be written"),
        ("/proc/dst", "nothing written"),
    ):
        assert main(["convert", str(hf_dir), str(tmp_path / dst)]) == 2
        told = capsys.readouterr().err
        assert message in told and told.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dead", "file", "hf"]


@pytest.mark.parametrize("left", [100, 5000, 60_000])
def test_a_full_disk(hf_dir, tmp_path, left):
    """No file may grow beyond ``left`` bytes: a quota, as a full disk, fails the write itself."""
    weights = (hf_dir / WEIGHTS).stat().st_size
    assert left < weights
    before = sorted(tmp_path.iterdir())
    code = (
        "import resource, signal, sys; from uta_jax.__main__ import main; "
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({left}, {left})); sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "convert", str(hf_dir), str(tmp_path / "dst")]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and "dst: nothing written" in done.stderr
    assert "File too large" in done.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_a_disk_that_is_full_says_so(hf_dir, tmp_path, refused, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    assert "dst: nothing written ([Errno 28] No space left on device)" in refused(hf_dir)


def test_a_disk_that_loses_a_bit(hf_dir, refused, monkeypatch):
    real = os.pwrite

    def careless(file, data, offset):
        data = bytearray(data)
        if len(data) == 56 * 32 * 4:
            data[100] ^= 4
        return real(file, data, offset)

    monkeypatch.setattr(os, "pwrite", careless)
    assert "nothing written (what was written reads differently)" in refused(hf_dir)
