"""The page of ``uta-jax report``: what is in it, what it says of what it lacks, how it looks."""

import json
import re
import shutil
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from uta_jax import UserError
from uta_jax.checkpoint import Checkpoints, load_run
from uta_jax.config import default_config, make_recipe, open_data
from uta_jax.config_files import save_config
from uta_jax.data.loader import TrainLoader
from uta_jax.evals import zeroshot
from uta_jax.models.presets import CLIP
from uta_jax.objectives import draw_mask, run_teacher
from uta_jax.pictures import colour, crops, judged
from uta_jax.report import report
from uta_jax.report.charts import Level, Line, chart, nice_ticks, thinned
from uta_jax.report.markup import tag
from uta_jax.report.runs import open_runs
from uta_jax.step import state_shapes, step_key

STEP = 40
WIDTHS = (1280, 400)
SECTIONS = ("Training", "Evaluation", "Time", "Configuration", "Crops and features by patch")
SECTIONS += ("Dense zero-shot", "Nearest neighbours", "Hardest classes")


def save_run(workdir, scenes, teacher_dir, objective="uta", mask="random", rows=True, saved=True):
    """A run as training leaves it, but for its weights, which are random."""
    c = default_config()
    c.objective, c.mask.kind = objective, mask
    c.student.preset, c.student.dtype, c.student.remat = "tiny_clip", "float32", "none"
    c.teacher.path, c.teacher.dtype = str(teacher_dir), "float32"
    c.data.path, c.data.batch_size, c.train.steps = str(scenes), 16, STEP
    c.eval.path, c.eval.batch_size = str(scenes), 64
    c.eval.captions.split = c.eval.masks.split = "val_scenes"
    workdir.mkdir(parents=True)
    save_config(c, workdir / "config.json")
    if rows:
        lines = [_row(step) for step in range(10, STEP + 1, 10)]
        lines.append(
            {"step": STEP, "zeroshot/top1": 0.5, "zeroshot/top5": 0.75, "ended": "complete"}
        )
        (workdir / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    if saved:
        shapes, rng = state_shapes(make_recipe(c, CLIP["tiny_clip"], 256)), np.random.default_rng(0)
        state = jax.tree.map(
            lambda leaf: jnp.asarray(0.1 * rng.normal(size=leaf.shape), leaf.dtype), shapes
        )
        with Checkpoints(workdir) as checkpoints:
            checkpoints.open(state)
            checkpoints.save(state.replace(step=np.int32(STEP)), {}, {"teacher": {}})
            checkpoints.wait()
    return workdir


def _row(step):
    seconds = {f"seconds/{phase}": 1.5 for phase in ("init", "compile", "data", "step", "eval")}
    figures = {"loss": -step / 50, "lr": 1e-3, "grad_norm": 1 / step, "images_per_s": 100.0 + step}
    more = {"seconds/checkpoint": 0.0, "seconds/lost": 0.0, "zeroshot/top1": step / 100}
    return {"step": step} | figures | seconds | more


@pytest.fixture(scope="module")
def runs(tmp_path_factory, scenes, teacher_dir):
    """Two runs, of which one names classes, and one has a name that HTML would choke on."""
    folder = tmp_path_factory.mktemp("runs")
    first = save_run(folder / "first", scenes, teacher_dir)
    figures = {"top1": 0.9, "top5": 1.0, "mean_class": 0.9, "n": 128}
    found = {"protocol": {"templates": 2}, "teacher": figures, "student": figures}
    found |= {"chance": {"top1": 1 / 128}}
    (first / "evaluate.json").write_text(json.dumps({"step": STEP, "zeroshot": found}))
    other = save_run(folder / "a<b>&c", scenes, teacher_dir, "maskalign", "attention")
    return first, other


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "both.html"
    report(list(runs), out, out.with_suffix(".json"))
    return out


class Page(HTMLParser):
    """Reads a page and keeps its tags, its text and what it refers to."""

    VOID = {"img", "meta", "link"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.text = [], [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, name, attributes):
        self.tags.append(name)
        self.links += [value for key, value in attributes if key in ("src", "href")]
        if name not in self.VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        self.text += data if self.open and self.open[-1] != "style" else ""


def test_the_page_is_whole_in_itself(page, runs):
    text = page.read_text()
    found = Page(text)  # every tag is closed in its order
    assert "script" not in found.tags and not re.search(r"@import|url\(", text)
    assert all(link.startswith(("data:", "#s")) for link in found.links)
    assert found.tags.count("img") > 100 and len(text) < 2e6
    for words in (*SECTIONS, "a<b>&c"):
        assert words in found.text
    summary = json.loads(page.with_suffix(".json").read_text())
    assert summary["first"]["teacher_top1"] == 0.9 and summary["first"]["loss"] == -0.8
    assert summary["first"]["images_per_s"] == 125 and summary["first"]["train_seconds"] == 1.5
    for run in runs:  # beside the page, in each folder
        assert json.loads((run / "summary.json").read_text()) == summary[run.name]
        for name in ("curves.png", "samples.png"):
            with Image.open(run / name) as picture:
                assert picture.width > 600


def test_only_keys_that_differ_are_shown(page):
    text = page.read_text()
    section = text[text.index(">Configuration<", text.index("<h2>")) :]
    keys = re.findall(r'<th scope="row"><code>([^<]*)', section)
    assert keys == ["mask.kind", "objective"]


def test_what_a_student_cannot_show_is_said_in_a_line(page):
    text = Page(page.read_text()).text
    line = "Not shown: the student shares no space with a text tower: it names no classes"
    assert text.count(line) == 2  # dense and hardest classes
    assert text.count("of each model's own") == 1 and text.count("of the teacher's, for both") == 1


def test_a_run_that_has_just_begun(tmp_path, scenes, teacher_dir):
    workdir = save_run(tmp_path / "new", scenes, teacher_dir, rows=False, saved=False)
    report([workdir])
    text = Page((workdir / "report.html").read_text()).text
    for line in (
        "metrics.jsonl holds no figures of training yet.",
        f"new was not evaluated: uta-jax evaluate --workdir={workdir}",
        "metrics.jsonl holds no ledger of time yet.",
        "No pictures: no checkpoint in",
    ):
        assert line in text


def test_images_that_are_gone_leave_the_rest(runs, tmp_path, scenes):
    workdir = shutil.copytree(runs[0], tmp_path / "moved")
    config = json.loads((workdir / "config.json").read_text())
    config["data"]["path"] = str(tmp_path / "gone")
    (workdir / "config.json").write_text(json.dumps(config))
    report([workdir])
    text = Page((workdir / "report.html").read_text()).text
    assert f"Not shown: data.path={tmp_path / 'gone'}: no TFDS dataset there" in text
    assert "Shares that are named" in text


def test_folders_that_are_no_runs_or_come_twice(runs, tmp_path):
    with pytest.raises(
        UserError, match="config.json is missing: not the workdir of a training run"
    ):
        report([runs[0], tmp_path])
    with pytest.raises(UserError, match="first: named twice"):
        report([runs[0], runs[0]])
    (tmp_path / "config.json").write_text((runs[0] / "config.json").read_text())
    (tmp_path / "evaluate.json").write_text('{"step"')
    with pytest.raises(UserError, match="evaluate.json is damaged: delete it"):
        report([tmp_path])
    with pytest.raises(UserError, match="no/such/page.html: No such file or directory"):
        report([runs[0]], tmp_path / "no/such/page.html")


def test_runs_of_one_name_are_told_apart(runs, tmp_path):
    same = tmp_path / "first"
    same.mkdir()
    (same / "config.json").write_text((runs[0] / "config.json").read_text())
    assert [run.name for run in open_runs([runs[0], same])] == [str(runs[0]), str(same)]
    assert open_runs([same])[0].name == "first"


# How it looks


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install it")
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_looks_right_in_chromium(browser, page, width, scheme, tmp_path):
    view = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said, asked = [], []
    view.on("console", lambda message: said.append(message.text))
    view.on("pageerror", lambda error: said.append(str(error)))
    view.on("request", lambda request: asked.append(request.url))
    view.goto(page.as_uri())
    assert not said and all(url.startswith(("file:", "data:")) for url in asked)
    assert view.evaluate("document.documentElement.scrollWidth") == width
    images = "[...document.images]"
    assert view.evaluate(f"{images}.every(i => i.complete && i.naturalWidth > 0)")
    # Nothing sticks out of the page but what scrolls within its own frame.
    assert not view.evaluate(
        "[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll')"
        " && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 99))"
    )
    shot = tmp_path / "page.png"
    view.screenshot(path=shot, full_page=True)
    assert shot.stat().st_size > 100_000
    view.close()


# Charts


def test_ticks_are_round_and_reach_over_the_range():
    for low, high in ((0, 1), (-0.93, -0.26), (3e-6, 2e-3), (5, 5), (0, 0), (-7, 1e6)):
        ticks = nice_ticks(low, high)
        assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 7
        assert np.allclose(np.diff(ticks), ticks[1] - ticks[0])


def test_long_lines_keep_their_ends_and_their_mean():
    points = [(x, float(x % 7)) for x in range(10_001)]
    thin = thinned(points)
    assert len(thin) <= 302 and (thin[0], thin[-1]) == (points[0], points[-1])
    assert np.mean([y for _, y in thin]) == pytest.approx(3, abs=0.05)
    assert thinned(points[:50]) == points[:50]


def test_a_chart_puts_figures_where_they_belong():
    text = chart("x<y", [Line("a", 0, [(0, 0.0), (50, 1.0), (100, 0.5)])], [Level("teacher", 0.75)])
    places = re.search(r'points="([^"]*)"', text)[1]
    (x0, y0), (x1, y1), (x2, y2) = (map(float, p.split(",")) for p in places.split())
    assert x1 - x0 == pytest.approx(x2 - x1) and y0 - y2 == pytest.approx(y2 - y1)
    level = re.search(r'class="level"><line [^>]*y1="([^"]*)"', text)[1]
    assert float(level) == pytest.approx((y1 + y2) / 2, abs=0.1) and "x&lt;y" in text
    assert chart("empty", [Line("a", 0, [])]) == ""


def test_text_is_escaped_and_markup_is_not():
    inner = tag("b", "<&>", title='"')
    assert tag("p", inner, "<") == '<p><b title="&quot;">&lt;&amp;&gt;</b>&lt;</p>'


# Pictures


def first_batch(run):
    data = run.config.data
    loader = TrainLoader(
        open_data(data), batch_size=data.batch_size, seed=0, image_size=64,
        crop_scale=data.crop_scale,
    )  # fmt: skip
    found = next(loader)["image"]
    loader.close()
    return found


def test_crops_and_masks_are_those_of_the_first_update(runs):
    """Also where they depend on what the teacher attends to."""
    for workdir in runs:
        run = load_run(workdir)
        task, size = run.task, run.config.data.batch_size
        image_bhwc = crops.training_crops(run.config, task, 8)
        np.testing.assert_array_equal(image_bhwc, first_batch(run)[:8])
        frozen = {"vision": run.teacher.params["vision"]}
        found = crops.look(
            run.student["vision"], frozen, image_bhwc, task=task, batch_size=size, seed=0
        )
        filled = np.resize(image_bhwc, (size, *image_bhwc.shape[1:]))
        teacher = run_teacher(frozen, filled, task, attention=True)
        keep_bk = draw_mask(step_key(0, 0), size, task, teacher)
        np.testing.assert_array_equal(found[2], keep_bk[:8])
        shown = crops.draw(image_bhwc, jax.device_get(found), task).rows[1].pictures[0]
        kept = (shown.reshape(8, 8, 8, 8, 3) != 128).any(axis=(1, 3, 4)).reshape(-1)
        assert set(np.flatnonzero(kept)) == set(np.asarray(keep_bk[0]).tolist())


def test_principal_colours_do_not_depend_on_signs_or_scale():
    rng = np.random.default_rng(0)
    feature_ne = rng.normal(size=(300, 8)) * [9, 5, 3, 1, 1, 1, 1, 1]
    turned_ee, _ = np.linalg.qr(rng.normal(size=(8, 8)))
    colours = colour.Principal(feature_ne).colours(feature_ne)
    again = colour.Principal(2 * feature_ne).colours(2 * feature_ne)
    assert np.array_equal(colours, again) and colours.min() == 0 and colours.max() == 255
    other = colour.Principal(feature_ne @ turned_ee).colours(feature_ne @ turned_ee).astype(int)
    mirrored = np.abs(255 - other - colours).max(axis=0)  # a sign may change with the axes
    assert (np.minimum(np.abs(other - colours).max(axis=0), mirrored) <= 1).all()
    flat = colour.Principal(np.ones((4, 2))).colours(np.ones((4, 2)))
    assert np.isfinite(flat).all()


def test_the_colour_scale_is_clipped_and_grows_lighter():
    found = colour.scale(np.array([-1, 0, 0.3, 0.6, 1, 2.0]), 0, 1).astype(int).sum(axis=1)
    assert found[0] == found[1] and found[-1] == found[-2] and (np.diff(found[1:-1]) > 0).all()


@pytest.fixture(scope="module")
def seen(runs):
    return judged.Judged(load_run(runs[0]), runs[0] / "features")


def test_hardest_classes_have_the_shares_of_the_evaluator(seen):
    found = judged.mistakes(seen, 5, 3)
    for name, model in seen.models.items():
        figures = zeroshot.run(model.params, {}, model.cfg)
        of = {key.split(" ", 1)[1]: x for key, x in figures.items() if key.startswith("class/")}
        assert found.shares[name] == pytest.approx([of[c] for c in found.classes])
        if name == "student":
            assert found.shares[name] == pytest.approx(sorted(of.values())[:5])
    per_class = np.bincount(seen.models["student"].pooled(seen.images()).label_n)
    assert found.counts.sum(axis=1).max() <= per_class.max() and found.images == 128
    assert found.columns[:5] == found.classes and found.columns[-1] == "others"
    right = np.diag(found.counts) / found.counts.sum(axis=1)
    assert right == pytest.approx(found.shares["student"])


def test_neighbours_are_the_nearest_without_the_image_itself(seen):
    strips = judged.strips(seen, 3, 4)
    for name, model in seen.models.items():
        feature_ne = model.pooled(seen.images()).feature_ne
        cosine_nn = feature_ne @ feature_ne.T - 2 * np.eye(len(feature_ne))
        for row, strip in zip((0, 42, 85), strips, strict=True):
            cosines = [cosine for _, _, cosine in strip.nearest[name]]
            assert cosines == pytest.approx(np.sort(cosine_nn[row])[::-1][:4], abs=1e-6)


def test_scenes_show_the_classes_of_their_masks(seen, scenes):
    found, classes = judged.scenes(seen, 2)
    source = seen.data("masks")
    for scene, index in zip(found, (0, 16), strict=True):
        mask = np.asarray(judged.decode(source[index]["mask"]))
        assert set(scene.layers["truth"][1]) == set(np.unique(mask[mask > 0]) - 1)
        assert set(scene.layers) == {"truth", "teacher", "student"}
        for pixels, numbers in scene.layers.values():
            assert pixels.shape == scene.image.shape and max(numbers) < len(classes)


def test_a_large_data_set_is_looked_at_in_part(seen, monkeypatch):
    monkeypatch.setattr(judged, "IMAGES", 50)
    part, whole = seen.images(), seen.data("test")
    assert len(part) == 50 and part[49]["key"] == whole[49 * 128 // 50]["key"]
    assert part.fingerprint() != whole.fingerprint()
