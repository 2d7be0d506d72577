"""Features for anyone: equal to the model's own functions, whatever they are read from."""

import io
import json
import tarfile
from dataclasses import asdict
from pathlib import Path

import jax
import numpy as np
import pytest
from interop_models import random_params, write_model
from PIL import Image

from uta_jax import UserError
from uta_jax import embed as embedding
from uta_jax.__main__ import main
from uta_jax.checkpoint import Checkpoints
from uta_jax.config import default_config, make_recipe
from uta_jax.config_files import save_config
from uta_jax.data.tokenizer import Tokenizer
from uta_jax.data.transforms import eval_transform, to_input
from uta_jax.embed import embed
from uta_jax.interop import translate
from uta_jax.interop.files import write_json
from uta_jax.interop.teacher import load_clip, write_recorded
from uta_jax.models.presets import ClipSpec, TextSpec, VitSpec
from uta_jax.models.text import TextTower
from uta_jax.models.vit import Vit
from uta_jax.step import state_shapes

GOLDEN = Path(__file__).parent / "golden" / "uta_released_tiny"
GOLDEN_SPEC = ClipSpec(
    VitSpec(
        64, 16, 64, 3, 4, 170, 48,
        act="swiglu", qkv_bias="qv", mlp_norm=True, head_bias=True, rope_theta=10000.0,
    ),
    TextSpec(16, 512, 64, 2, 4, 256, 48),
)  # fmt: skip
TEXTS = ["a photo of a cat", "", "zwei Hunde – 两只狗", "  the last one "]
COUNT = 11  # fills no batch and no eight devices evenly


def read(path):
    with np.load(path) as arrays:
        return dict(arrays)


def png(seed):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (int(rng.integers(60, 90)), int(rng.integers(60, 90)), 3))
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    (root / "b").mkdir()
    for i in range(COUNT):
        (root / ("b" if i % 2 else "") / f"{i:02}.png").write_bytes(png(i))
    return root


@pytest.fixture(scope="module")
def clip(teacher_dir):
    return load_clip(teacher_dir)


@pytest.fixture(scope="module")
def array_nhwc(clip):
    shape = (COUNT, clip.spec.vision.image_size, clip.spec.vision.image_size, 3)
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def golden_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    (folder / "uta.safetensors").symlink_to(GOLDEN.with_suffix(".safetensors"))
    record = {"format": "uta", "weights": "uta.safetensors", "spec": asdict(GOLDEN_SPEC)}
    write_json(folder / "spec.json", record)
    return folder


@pytest.fixture(scope="module")
def golden():
    return read(GOLDEN.with_suffix(".npz"))


def save(folder, **arrays):
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return [folder / f"{name}.npy" for name in arrays]


def all_close(a, b, atol=1e-5):
    assert a.dtype == b.dtype == np.float32 and a.shape == b.shape
    np.testing.assert_allclose(a, b, rtol=0, atol=atol)


def test_a_folder_and_texts_are_what_the_model_makes_of_them(teacher_dir, clip, photos, tmp_path):
    """Keys, order and features, over several batches of which the last is not full."""
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    out = tmp_path / "deep" / "out.npz"
    shapes = embed(teacher_dir, out, images=photos, texts=texts, batch_size=8)
    found = read(out)
    assert shapes == {name: array.shape for name, array in found.items()}
    names = sorted(p.relative_to(photos).as_posix() for p in photos.rglob("*.png"))
    assert found["keys"].tolist() == names and len(names) == COUNT
    spec = clip.spec
    pixels = np.stack([eval_transform((photos / name).read_bytes(), 64) for name in names])
    image = to_input(pixels, spec.mean, spec.std, 64)
    tokens = np.asarray(Vit(spec.vision).apply({"params": clip.params["vision"]}, image))
    all_close(found["image_features"], tokens[:, 0])
    ids = Tokenizer(spec.text.context)(TEXTS)
    features = np.asarray(TextTower(spec.text).apply({"params": clip.params["text"]}, ids))
    all_close(found["text_features"], features)
    assert not np.allclose(np.linalg.norm(features, axis=1), 1)


def test_a_tar_is_read_as_its_folder(teacher_dir, photos, tmp_path):
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        for path in sorted(photos.rglob("*.png")):
            tar.add(path, path.name)
        tar.addfile(tarfile.TarInfo("readme.txt"))
    embed(teacher_dir, tmp_path / "a.npz", images=photos)
    embed(teacher_dir, tmp_path / "b.npz", images=tmp_path / "photos.tar")
    a, b = read(tmp_path / "a.npz"), read(tmp_path / "b.npz")
    order = {Path(key).stem: row for key, row in zip(a["keys"], a["image_features"], strict=True)}
    assert len(order) == COUNT
    for key, row in zip(b["keys"], b["image_features"], strict=True):
        np.testing.assert_array_equal(row, order[Path(key).stem])


def test_tokens_of_all_patches_and_of_kept_ones(golden_dir, golden, tmp_path):
    """The tensors that the authors' own code made, from their NCHW images."""
    images, keep = save(tmp_path, images=golden["images"], keep=golden["visible_indices"])
    embed(golden_dir, tmp_path / "all.npz", images=images, tokens=True)
    embed(golden_dir, tmp_path / "kept.npz", images=images, tokens=True, keep=keep)
    whole, kept = read(tmp_path / "all.npz"), read(tmp_path / "kept.npz")
    all_close(whole["image_tokens"], golden["student_tokens_all"], 2e-5)
    all_close(whole["image_features"], golden["pooled"], 2e-5)
    all_close(kept["image_tokens"], golden["student_tokens_visible"], 2e-5)
    np.testing.assert_array_equal(kept["image_features"], kept["image_tokens"][:, 0])


def test_kept_patches_stay_in_the_order_given(golden_dir, golden, tmp_path):
    turned = golden["visible_indices"][:, ::-1]
    images, keep = save(tmp_path, images=golden["images"], keep=turned.astype(np.uint16))
    embed(golden_dir, tmp_path / "o.npz", images=images, tokens=True, keep=keep)
    want = golden["student_tokens_visible"]
    all_close(read(tmp_path / "o.npz")["image_tokens"][:, 1:], want[:, :0:-1], 2e-5)
    embed(golden_dir, tmp_path / "p.npz", images=images, keep=keep)
    assert read(tmp_path / "p.npz").keys() == {"image_features", "keys"}
    all_close(read(tmp_path / "p.npz")["image_features"], want[:, 0], 2e-5)


def test_channels_first_equals_channels_last(teacher_dir, array_nhwc, tmp_path):
    first, last = save(tmp_path, first=array_nhwc.transpose(0, 3, 1, 2), last=array_nhwc)
    for path in (first, last):
        embed(teacher_dir, path.with_suffix(".npz"), images=path, tokens=True)
    a, b = read(first.with_suffix(".npz")), read(last.with_suffix(".npz"))
    assert a["keys"].tolist() == [str(i) for i in range(COUNT)]
    assert all(np.array_equal(a[name], b[name]) for name in a)


def test_eight_devices_and_any_batch_size_give_what_one_gives(
    teacher_dir, array_nhwc, tmp_path, monkeypatch
):
    """Rows keep their places; one shape of batch means one compilation."""
    (images,) = save(tmp_path, images=array_nhwc)
    rng = np.random.default_rng(2)
    (keep,) = save(tmp_path, keep=np.stack([rng.permutation(64)[:9] for _ in range(COUNT)]))
    assert len(jax.devices()) == 8
    before = embedding.encode_images._cache_size()
    embed(teacher_dir, tmp_path / "8.npz", images=images, keep=keep, tokens=True, batch_size=3)
    assert embedding.encode_images._cache_size() == before + 1
    one = embedding.meshes.make_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr(embedding.meshes, "make_mesh", lambda: one)
    embed(teacher_dir, tmp_path / "1.npz", images=images, keep=keep, tokens=True, batch_size=4)
    a, b = read(tmp_path / "8.npz"), read(tmp_path / "1.npz")
    all_close(a["image_tokens"], b["image_tokens"])
    all_close(a["image_features"], b["image_features"])


def test_bfloat16_follows_float32(teacher_dir, array_nhwc, tmp_path):
    (images,) = save(tmp_path, images=array_nhwc)
    for dtype in ("float32", "bfloat16"):
        embed(teacher_dir, tmp_path / f"{dtype}.npz", images=images, dtype=dtype)
    a, b = (read(tmp_path / f"{x}.npz")["image_features"] for x in ("float32", "bfloat16"))
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert b.dtype == np.float32 and cosine.min() > 0.999 and not np.array_equal(a, b)


def test_a_run_gives_its_average_where_it_keeps_one(teacher_dir, clip, array_nhwc, tmp_path):
    c = default_config()
    c.student.preset, c.teacher.path = "tiny_clip", str(teacher_dir)
    c.data.path, c.data.batch_size, c.train.steps, c.optim.ema_decay = "data", 16, 50, 0.9
    (tmp_path / "run").mkdir()
    shapes = state_shapes(make_recipe(c, clip.spec, 256))
    state = jax.tree.map(lambda leaf: jax.numpy.ones(leaf.shape, leaf.dtype), shapes)
    average = {"vision": jax.tree.map(lambda x: x * np.float32(1.1), clip.params["vision"])}
    checkpoints = Checkpoints(tmp_path / "run")
    checkpoints.open(state)
    checkpoints.save(
        state.replace(step=np.int32(5), ema=jax.device_put(average)), {}, {"teacher": {}}
    )
    checkpoints.close()
    save_config(c, tmp_path / "run" / "config.json")
    (images,) = save(tmp_path, images=array_nhwc)
    (tmp_path / "t.txt").write_text("x")
    embed(tmp_path / "run", tmp_path / "o.npz", images=images, texts=tmp_path / "t.txt")
    found, vit = read(tmp_path / "o.npz"), Vit(clip.spec.vision)
    want = vit.apply({"params": average["vision"]}, array_nhwc, method="features")
    all_close(found["image_features"], np.asarray(want))
    text = {"params": clip.params["text"]}
    want = TextTower(clip.spec.text).apply(text, Tokenizer(clip.spec.text.context)(["x"]))
    all_close(found["text_features"], np.asarray(want))


def test_a_vision_tower_alone_that_pools_by_attention(tmp_path, capsys):
    """The pooled token stands where CLS does, and sees the kept patches only."""
    spec = ClipSpec(
        VitSpec(16, 8, 16, 1, 2, 32, 16, cls=False, pool="map", head_proj=False), None,
        resize="squash",
    )  # fmt: skip
    rng = np.random.default_rng(0)
    shapes = translate.param_shapes(spec)
    flat = {path: np.float32(0.3 * rng.normal(size=x)) for path, x in shapes.items()}
    (tmp_path / "m").mkdir()
    write_recorded(tmp_path / "m", "uta_jax", "weights.safetensors", flat, spec, {})
    image = rng.normal(size=(2, 16, 16, 3)).astype(np.float32)
    images, keep = save(tmp_path, images=image, keep=np.array([[2, 0, 1], [3, 1, 2]]))
    embed(tmp_path / "m", tmp_path / "o.npz", images=images, keep=keep, tokens=True)
    params = {"params": translate.unflatten(flat)["vision"]}
    want = np.asarray(Vit(spec.vision).apply(params, image, np.load(keep)))
    found = read(tmp_path / "o.npz")
    assert want.shape == (2, 4, 16)
    all_close(found["image_tokens"], want)
    all_close(found["image_features"], want[:, 0])
    (tmp_path / "t.txt").write_text("x")
    argv = [f"--model={tmp_path / 'm'}", f"--texts={tmp_path / 't.txt'}"]
    assert "m has no text tower" in refuse(capsys, *argv, f"--out={tmp_path / 'p.npz'}")


# Mistakes: one line, nothing written


def refuse(capsys, *argv):
    """The line that the command ends with."""
    assert main(["embed", *map(str, argv)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("uta-jax embed: ")
    return line


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "nothing to embed: give --images, --texts or both"),
        (["--texts=t.txt", "--tokens"], "--tokens is about images"),
        (["--texts=t.txt", "--keep=k.npy"], "--keep is about images"),
        (["--texts=t.txt", "--batch-size=0"], "--batch-size=0: must be at least 1"),
        (["--texts=nowhere.txt"], "--texts=nowhere.txt: cannot be read (No such file"),
        (["--texts=empty.txt"], "--texts=empty.txt: holds no text"),
        (["--texts=latin.txt"], "--texts=latin.txt: not UTF-8 (byte 1)"),
        (["--images=nowhere"], "--images=nowhere: give a folder, a .tar or an .npy"),
        (["--images=nowhere.tar"], "--images=nowhere.tar: no such file"),
        (["--images=broken.tar"], "broken.tar"),
        (["--images=none"], "no images found"),
        (["--images=bad"], "image 'x.png': not an image"),
        (["--images=nowhere.npy"], "nowhere.npy: cannot be read"),
        (["--images=objects.npy"], "objects.npy: not a readable .npy file"),
        (["--images=cut.npy"], "cut.npy: not a readable .npy file"),
        (["--images=header.npy"], "header.npy: not a readable .npy file"),
        (["--images=bytes.npy"], "uint8 [2, 64, 64, 3] must be normalised floats"),
        (["--images=both.npy"], "both axis 1 and axis 3 are 3 long"),
        (["--images=neither.npy"], "neither axis 1 nor axis 3 is 3 long"),
        (["--images=small.npy"], "32 x 32 pixels, the model takes 64 x 64"),
        (["--images=nan.npy"], "NaN or infinity in row 1"),
        (["--images=good.npy", "--keep=float.npy"], "float64 [2, 1] must be integers [n, k]"),
        (["--images=good.npy", "--keep=few.npy"], "must have a row for each of the 2 images"),
        (["--images=good.npy", "--keep=out.npy"], "row 1 leaves the patches 0 to 63"),
        (["--images=good.npy", "--keep=negative.npy"], "row 0 leaves the patches 0 to 63"),
        (["--images=good.npy", "--keep=twice.npy"], "row 1 names a patch twice"),
    ],
)
def test_mistakes(teacher_dir, tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    good = np.zeros((2, 64, 64, 3), np.float32)
    save(
        tmp_path,
        good=good, bytes=good.astype(np.uint8), both=good[:, :3], neither=good[..., :2],
        small=good[:, :32, :32], nan=np.stack([good[0], good[1] * np.nan]),
        float=np.zeros((2, 1)), few=np.zeros((1, 1), int), out=np.array([[0], [64]]),
        negative=np.array([[-1], [0]]), twice=np.array([[0, 1], [5, 5]]),
    )  # fmt: skip
    np.save("objects.npy", np.array([{}]), allow_pickle=True)
    Path("cut.npy").write_bytes(Path("good.npy").read_bytes()[:-9])
    Path("header.npy").write_bytes(b"\x93NUMPY\x01\x00\x0a\x00{'descr': (\n")
    for name, data in {"t": b"x", "empty": b"\n \n", "latin": b"x\xe4"}.items():
        Path(f"{name}.txt").write_bytes(data)
    Path("broken.tar").write_bytes(b"no tar at all")
    Path("none").mkdir()
    Path("bad").mkdir()
    Path("bad/x.png").write_bytes(b"GIF8 or not")
    before = sorted(tmp_path.rglob("*"))
    assert message in refuse(capsys, f"--model={teacher_dir}", "--out=out.npz", *argv)
    assert sorted(tmp_path.rglob("*")) == before


def test_texts_need_the_tokenizer_of_the_model(tmp_path, capsys):
    """Ids that it does not know, a file that is not there; and no folder makes it a run."""
    write_model(tmp_path / "few", "hf_clip")
    (tmp_path / "few" / "checkpoints").mkdir()
    vision = VitSpec(16, 8, 16, 1, 2, 32, 16, cls=False, pool="map", head_proj=False)
    text = TextSpec(8, 50, 16, 1, 2, 32, 16)
    spec = ClipSpec(vision, text, tokenizer="spiece.model")
    (tmp_path / "none").mkdir()
    params = translate.flatten(random_params(spec))
    write_recorded(tmp_path / "none", "uta_jax", "weights.safetensors", params, spec, {})
    (tmp_path / "t.txt").write_text("a cat")
    argv = [f"--texts={tmp_path / 't.txt'}", f"--out={tmp_path / 'o.npz'}", "--model"]
    line = refuse(capsys, *argv, tmp_path / "few")
    assert "gives id 49407, but the text tower knows 50 tokens" in line
    assert "none lacks its tokenizer 'spiece.model'" in refuse(capsys, *argv, tmp_path / "none")
    assert not (tmp_path / "o.npz").exists()


@pytest.mark.parametrize("name", ["x" * 300 + ".npz", "a\0b.npz", "link.npz", "t.txt/o.npz"])
def test_no_file_can_be_there(teacher_dir, tmp_path, name):
    (tmp_path / "t.txt").write_text("a cat")
    (tmp_path / "link.npz").symlink_to(tmp_path / "nowhere.npz")
    with pytest.raises(UserError, match=r"--out=.*: (cannot be written|already exists)"):
        embed(teacher_dir, tmp_path / name, texts=tmp_path / "t.txt")


def test_an_earlier_file_is_replaced_only_when_asked(teacher_dir, tmp_path, capsys):
    out, texts = tmp_path / "out.npz", tmp_path / "t.txt"
    texts.write_text("a cat")
    out.write_text("precious")
    argv = [f"--model={teacher_dir}", f"--texts={texts}", "--out"]
    assert "already exists; remove it or ask for --overwrite" in refuse(capsys, *argv, out)
    assert out.read_text() == "precious"
    assert "out.txt: must end in .npz" in refuse(capsys, *argv, tmp_path / "out.txt")
    (tmp_path / "dir.npz").mkdir()
    assert "is a directory" in refuse(capsys, *argv, tmp_path / "dir.npz", "--overwrite")
    assert main(["embed", *argv, str(out), "--overwrite"]) == 0
    assert capsys.readouterr().out == f"{out}: text_features [1, 64]\n"
    assert read(out)["text_features"].shape == (1, 64)
    assert json.dumps(sorted(p.name for p in tmp_path.iterdir())) == (
        '["dir.npz", "out.npz", "t.txt"]'
    )


def test_a_full_disk_leaves_nothing(teacher_dir, tmp_path, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array", full)
    (tmp_path / "t.txt").write_text("a cat")
    argv = [f"--model={teacher_dir}", f"--texts={tmp_path / 't.txt'}", "--out", tmp_path / "o.npz"]
    assert "o.npz: nothing written ([Errno 28] No space left" in refuse(capsys, *argv)
    assert [p.name for p in tmp_path.iterdir()] == ["t.txt"]
