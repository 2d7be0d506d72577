"""uta-jax data verify: every example is decoded, and whatever is bad is named."""

import functools
import io
import json
import shlex
import tarfile

import numpy as np
import pytest
from pictures import Pictures
from PIL import Image

from uta_jax.__main__ import _parser, main
from uta_jax.actions import DATA
from uta_jax.data.mixture import Mixture
from uta_jax.data.verify import _Tally, guess_kind, verify


@pytest.fixture
def folder(tmp_path):
    """Twelve good images: ten PNGs, a JPEG and a PNG called .jpg."""
    root = tmp_path / "images"
    root.mkdir()
    pictures = Pictures(12)
    for n in range(10):
        (root / f"{n:02}.png").write_bytes(pictures.image(n))
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG")
    (root / "10.jpg").write_bytes(buffer.getvalue())
    (root / "11.jpg").write_bytes(pictures.image(11))
    return root


def run(folder, tmp_path, *arguments):
    """(exit code, report) of the command."""
    out = tmp_path / "report.json"
    argv = ["data", "verify", str(folder), "--workers=1", f"--json={out}", *arguments]
    return main(argv), json.loads(out.read_text()) if out.exists() else None


def flip_a_byte(path):
    """In the compressed data of a JPEG, where no marker is near: it is decoded without an error."""
    data = bytearray(path.read_bytes())
    at = next(n for n in range(len(data) // 2, len(data)) if max(data[n - 2 : n + 3]) < 0xF0)
    data[at] ^= 1
    path.write_bytes(data)


def test_a_good_set(folder, tmp_path, capsys):
    code, report = run(folder, tmp_path)
    assert code == 0 and report["good"] and not report["bad"] and not report["problems"]
    assert report["examples"] == report["source"]["examples"] == 12
    assert report["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    assert report["formats"] == {"PNG": 11, "JPEG": 1}  # by content, not by name
    assert report["modes"] == {"RGB": 11, "L": 1}
    assert (report["smallest"], report["largest"]) == ([12, 12], [30, 20])
    assert report["images_per_s"] > 0 and report["duplicates"] == 0
    captured = capsys.readouterr()
    assert "12 examples" in captured.out and "PNG 11, JPEG 1" in captured.out
    assert "12/12" in captured.err  # the bar


def test_bad_files_and_duplicates_are_named(folder, tmp_path, capsys):
    (folder / "03.png").write_bytes(b"")
    (folder / "05.png").write_bytes((folder / "05.png").read_bytes()[:200])
    (folder / "07.png").write_bytes(b"<html>404</html>")
    for again in ("08", "09"):
        (folder / f"{again}.png").write_bytes((folder / "02.png").read_bytes())
    code, report = run(folder, tmp_path)
    assert code == 1 and not report["good"]
    reasons = {bad["key"]: bad["reason"] for bad in report["bad"]}
    assert [*reasons] == ["03.png", "05.png", "07.png"]
    assert "0 bytes" in reasons["03.png"] and "broken" in reasons["05.png"]
    assert "not an image" in reasons["07.png"]
    assert report["duplicate_keys"] == [["02.png", "08.png"], ["02.png", "09.png"]]
    out = capsys.readouterr().out
    assert "bad        3" in out and "'05.png': broken" in out and "duplicates 2" in out


def test_a_flipped_byte_is_found_by_hashes_alone(folder, tmp_path):
    hashes = tmp_path / "hashes.txt"
    assert run(folder, tmp_path, f"--write-hashes={hashes}")[0] == 0
    lines = hashes.read_text().splitlines()
    assert len(lines) == 12 and lines[0].endswith("  00.png")
    assert run(folder, tmp_path, f"--hashes={hashes}")[0] == 0
    flip_a_byte(folder / "10.jpg")
    assert run(folder, tmp_path)[0] == 0  # nothing to be seen
    code, report = run(folder, tmp_path, f"--hashes={hashes}")
    assert code == 1
    assert report["bad"] == [{"key": "10.jpg", "reason": f"differs from {hashes}"}]


def test_hashes_of_another_set(folder, tmp_path):
    hashes = tmp_path / "hashes.txt"
    run(folder, tmp_path, f"--write-hashes={hashes}")
    (folder / "11.jpg").rename(folder / "12.jpg")
    code, report = run(folder, tmp_path, f"--hashes={hashes}")
    assert code == 1 and "'11.jpg'" in report["bad"][0]["reason"]
    (folder / "12.jpg").unlink()
    code, report = run(folder, tmp_path, f"--hashes={hashes}")
    assert code == 1 and "more than the 11 examples" in report["bad"][0]["reason"]
    hashes.write_text("nonsense\n")
    assert run(folder, tmp_path, f"--hashes={hashes}")[0] == 2
    assert run(folder, tmp_path, "--hashes=no/such/file")[0] == 2
    hashes.write_bytes(bytes(range(256)))
    assert run(folder, tmp_path, f"--hashes={hashes}")[0] == 2


def test_hashes_are_compared_and_written_anew_in_one_run(folder, tmp_path, monkeypatch):
    hashes = tmp_path / "hashes.txt"
    both = (f"--hashes={hashes}", f"--write-hashes={hashes}")
    assert run(folder, tmp_path, both[1])[0] == 0
    before = hashes.read_text()
    assert run(folder, tmp_path, *both)[0] == 0 and hashes.read_text() == before
    (folder / "00.png").write_bytes((folder / "01.png").read_bytes())
    code, report = run(folder, tmp_path, *both)
    assert code == 1 and [bad["key"] for bad in report["bad"]] == ["00.png"]
    whole = hashes.read_text()
    assert whole != before and len(whole.splitlines()) == 12
    monkeypatch.setattr(_Tally, "report", lambda *_: 1 / 0)  # an interruption
    with pytest.raises(ZeroDivisionError):
        run(folder, tmp_path, f"--write-hashes={hashes}")
    assert hashes.read_text() == whole
    assert {path.name for path in tmp_path.iterdir()} == {"images", "hashes.txt", "report.json"}


@pytest.mark.parametrize(
    "arguments",
    [
        ("verify", "FOLDER", "--json=/nonexistent/x.json"),
        ("verify", "FOLDER", "--write-hashes=/nonexistent/x.txt"),
        ("verify", "FOLDER", "--workers=-1"),
        ("verify", "memory://nothing"),
        ("verify", "foo://x"),
        ("verify", "foo://x", "--source=tfds"),
        ("verify", "recipe.py", "--split=train"),
        ("verify", "recipe.py", "--source=tar"),
        ("bench", "FOLDER", "--json=/nonexistent/x.json"),
        ("bench", "FOLDER", "--image_size=0"),
        ("bench", "FOLDER", "--workers=0"),
        ("index", "FOLDER/00.png"),
        ("index", "NO_IMAGE"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(arguments, folder, tmp_path, capsys):
    with tarfile.open(tmp_path / "0.tar", "w") as file:
        file.addfile(tarfile.TarInfo("1.txt"))
    before = set(tmp_path.rglob("*"))
    places = {"FOLDER": str(folder), "NO_IMAGE": str(tmp_path / "0.tar")}
    argv = [functools.reduce(lambda a, p: a.replace(*p), places.items(), a) for a in arguments]
    assert main(["data", *argv]) == 2
    *bar, line = capsys.readouterr().err.splitlines()
    assert line.startswith("uta-jax data: ") and "Traceback" not in "".join(bar)
    assert set(tmp_path.rglob("*")) == before


def test_a_recipe_names_its_data(folder, tmp_path, capsys):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from uta_jax.config import default_config\n\n\ndef get_config():\n"
        "    c = default_config()\n    c.data.source, c.data.split = 'folder', ''\n    return c\n"
    )
    code, report = run(recipe, tmp_path, f"--config.data.path={folder}")
    assert code == 0 and report["examples"] == 12
    (folder / "10.jpg").write_bytes((folder / "10.jpg").read_bytes()[:-40])
    data = f"--config.data.path={folder}"
    assert run(recipe, tmp_path, data)[0] == 1
    assert run(recipe, tmp_path, data, "--config.data.allow_truncated=True")[0] == 0
    assert run(folder, tmp_path, "--config.data.path=x")[0] == 2
    assert "unexpected argument" in capsys.readouterr().err


def test_a_mixture_is_verified_once_and_labels_with_it():
    class Odd(Pictures):
        def __getitem__(self, index):
            return super().__getitem__(index) | ({"label": 2} if index == 1 else {})

    report = verify(Mixture([Pictures(4), Odd(7)], [3, 1]))
    assert report["source"]["0.examples in an epoch"] == 21 and report["examples"] == 11
    assert report["duplicates"] == 4 and ["0/pic-0", "1/pic-0"] in report["duplicate_keys"]
    assert [bad["key"] for bad in report["bad"]] == ["1/pic-1"]
    assert report["bad"][0]["reason"] == "label 2 is not in 0 .. 1"


@pytest.mark.parametrize("workers", [0, 2])
def test_more_than_a_batch(workers):
    report = verify(Pictures(150, bad=(70,), lost=(140,), text=False), workers=workers)
    assert [bad["key"] for bad in report["bad"]] == ["pic-70", "example 140"]
    assert sum(report["formats"].values()) == 148


@pytest.mark.parametrize(
    "name, kind",
    [
        ("dataset_info.json", "tfds"),
        ("train-0.tar", "tar"),
        ("train-0.parquet", "parquet"),
        ("train.array_record-00000-of-00002", "arrayrecord"),
        ("x.arrayrecord", "arrayrecord"),
        ("cat/1.png", "folder"),
    ],
)
def test_the_kind_is_guessed_by_names(name, kind, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    assert guess_kind(tmp_path) == kind


@pytest.mark.parametrize("action", DATA)
def test_help_of_an_action_with_an_example_that_parses(action, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["data", action, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert DATA[action].summary in text and DATA[action].example in text
    program, *arguments = shlex.split(DATA[action].example)
    args, rest = _parser().parse_known_args(arguments)
    assert (program, args.command, args.action, rest) == ("uta-jax", "data", action, [])


def test_the_command_that_indexes_tar_shards(tmp_path, capsys):
    with tarfile.open(tmp_path / "0.tar", "w") as file:
        member = tarfile.TarInfo("1.png")
        member.size = len(image := Pictures(1).image(0))
        file.addfile(member, io.BytesIO(image))
    assert main(["data", "index", str(tmp_path)]) == 0
    assert "examples  1" in capsys.readouterr().out
    assert run(tmp_path, tmp_path)[1]["source"]["kind"] == "tar"
