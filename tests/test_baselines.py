"""mim, distill, maskalign: what each loss is, sees and moves, and what it costs beside uta."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uta_jax import UserError, masking, mesh
from uta_jax.config import default_config
from uta_jax.models import presets
from uta_jax.models.heads import LayerHeads
from uta_jax.models.vit import Vit, encode_seen, init_vit
from uta_jax.objectives import (
    DECODER,
    OBJECTIVES,
    Task,
    cosine,
    distill,
    layer_loss,
    maskalign,
    mim,
    student_input,
    teacher_tokens,
    uta,
    whiten,
)
from uta_jax.optimizer import decay_mask
from uta_jax.tasks import make_task

VISION = replace(presets.VIT["tiny_clip"], width=32, heads=2, mlp_hidden=48, depth=2, out_dim=16)
TEXT = presets.TextSpec(8, 64, 16, 1, 2, 32, 16)
CLIP = presets.ClipSpec(VISION, TEXT)
BARE = replace(VISION, out_dim=32, head_proj=False)
LAST_ONE = "loss_layer_-1"


def _task(objective, keep=24, kind="random", **changes):
    student = VISION if OBJECTIVES[objective].joint_space else BARE
    mask = masking.Mask(kind, keep, 4)
    task = Task(objective, student, CLIP.mean, CLIP.std, teacher=CLIP, mask=mask, text=TEXT)
    return replace(task, **changes)


def _images(seed=0, batch=4):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(0, 256, (batch, 64, 64, 3), dtype=np.uint8))


def _start(task, seed=0):
    """(params, frozen, key)"""
    frozen = {"vision": init_vit(VISION, jax.random.key(9))}
    return OBJECTIVES[task.objective].init(jax.random.key(seed), task), frozen, jax.random.key(3)


def _shown(keep_bk):
    shown_bn = np.zeros((len(keep_bk), 64), bool)
    np.put_along_axis(shown_bn, np.asarray(keep_bk), True, axis=1)
    return shown_bn


def _pixels(shown_bn):
    return shown_bn.reshape(-1, 8, 8).repeat(8, axis=1).repeat(8, axis=2)[..., None]


# mim


def test_the_loss_of_mim_is_over_masked_patches_alone():
    """Counted again from the tokens of both towers at every place."""
    task = _task("mim")
    params, frozen, key = _start(task)
    image = _images()
    shown_bn = _shown(masking.sample(key, 4, 8, task.mask))
    blank = (jnp.asarray(~shown_bn), params[DECODER]["mask_token"])
    vit, variables = task.vit(), {"params": params["vision"]}
    tokens = vit.apply(variables, student_input(image, task), blank=blank, method="encode")
    everywhere = jnp.tile(jnp.arange(64), (4, 1))
    target = teacher_tokens(frozen, image, everywhere, task)
    cos = cosine(vit.apply(variables, tokens, method="project"), target)[:, 1:]
    loss, _ = mim(params, frozen, {"image": image}, key, task)
    np.testing.assert_allclose(loss, -np.asarray(cos)[~shown_bn].mean(), atol=1e-6)
    assert abs(loss + np.asarray(cos)[shown_bn].mean()) > 1e-3


def test_mim_does_not_see_what_is_masked():
    """With a teacher that does not look, masked pixels change neither loss nor gradient."""
    task = _task("mim")
    params, blind, key = _start(task)
    blind["vision"]["patch_embed"]["kernel"] *= 0
    seen = _pixels(_shown(masking.sample(key, 4, 8, task.mask)))
    image, other = _images(), _images(1)

    def value(images):
        return jax.grad(lambda p: mim(p, blind, {"image": images}, key, task)[0])(params)

    masked_changed = jnp.where(seen, image, other)
    jax.tree.map(np.testing.assert_array_equal, value(image), value(masked_changed))
    visible_changed = mim(params, blind, {"image": jnp.where(seen, other, image)}, key, task)[0]
    assert visible_changed != mim(params, blind, {"image": image}, key, task)[0]


def test_mim_is_at_its_minimum_where_both_see_nothing_alike():
    """Without a patch embedding all that is left are positions: student and teacher are one."""
    task = _task("mim")
    params, _, key = _start(task)
    params["vision"]["patch_embed"] = jax.tree.map(jnp.zeros_like, params["vision"]["patch_embed"])
    params[DECODER]["mask_token"] *= 0
    loss, _ = mim(params, params, {"image": _images()}, key, task)
    np.testing.assert_allclose(loss, -1, atol=1e-6)


def test_the_complement_of_a_mask():
    keep_bk = masking.sample(jax.random.key(0), 32, 8, masking.Mask("random", 20))
    dropped_bn, place_bm = masking.complement(keep_bk, 64)
    np.testing.assert_array_equal(dropped_bn, ~_shown(keep_bk))
    np.testing.assert_array_equal(_shown(place_bm), ~_shown(keep_bk))
    assert place_bm.shape == (32, 44) and (np.diff(place_bm) > 0).all()


# distill


def test_distill_is_uta_with_nothing_masked():
    task = _task("distill", keep=64, cls_weight=3.0)
    params, frozen, key = _start(task)
    batch = {"image": _images()}
    ours, theirs = (
        jax.value_and_grad(lambda p, f=f: f(p, frozen, batch, key, task)[0])(params)
        for f in (distill, uta)
    )
    np.testing.assert_allclose(ours[0], theirs[0], atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ours[1], theirs[1])


# maskalign


def test_the_loss_of_maskalign_is_zero_at_its_targets_and_the_equation_elsewhere():
    rng = np.random.default_rng(0)
    target = whiten(jnp.asarray(rng.normal(3, 2, (2, 3, 5, 7)), jnp.float32))
    np.testing.assert_allclose(target.mean(-1), 0, atol=1e-6)
    np.testing.assert_allclose(target.std(-1), 1, atol=1e-4)
    assert layer_loss(target, target)[0] == 0
    predicted = rng.normal(size=target.shape).astype(np.float32)
    error = np.abs(predicted - np.asarray(target))
    smooth = np.where(error < 1, 0.5 * error**2, error - 0.5)
    loss, metrics = layer_loss(jnp.asarray(predicted), target)
    np.testing.assert_allclose(loss, 2 * smooth.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics[LAST_ONE], 2 * smooth[-1].mean(), rtol=1e-5)


@pytest.mark.parametrize("depth, expected", [(6, np.eye(6)[1:] + 0.01), (4, np.full((5, 4), 0.25))])
def test_layers_start_mixed_as_published(depth, expected):
    heads = LayerHeads(6, 5, 8, jnp.float32)
    params = heads.init(jax.random.key(0), jnp.zeros((depth, 1, 1, 12)))["params"]
    np.testing.assert_allclose(params["mix"], expected)
    layers = np.random.default_rng(0).normal(size=(depth, 2, 3, 12)).astype(np.float32)
    params["bias"] += 0.5
    found = heads.apply({"params": params}, jnp.asarray(layers))
    for m in range(5):
        mixed = np.tensordot(expected[m], layers, axes=1)
        by_hand = mixed @ np.asarray(params["kernel"][m]) + 0.5
        np.testing.assert_allclose(found[m], by_hand, rtol=1e-4, atol=1e-5)


def test_a_head_is_drawn_like_a_map_of_its_own():
    """The axis that counts the heads is no fan."""
    params = LayerHeads(4, 4, 64, jnp.float32).init(jax.random.key(0), jnp.zeros((4, 1, 1, 64)))
    np.testing.assert_allclose(params["params"]["kernel"].std(), (2 / 128) ** 0.5, rtol=0.05)


def test_a_gradient_reaches_the_mixing_of_all_layers():
    task = _task("maskalign", kind="attention")
    params, frozen, key = _start(task)
    grads = jax.grad(lambda p: maskalign(p, frozen, {"image": _images()}, key, task)[0])(params)
    assert grads[DECODER]["mix"].shape == (2, 2) and grads[DECODER]["mix"].all()


def test_layers_and_attention_are_those_of_the_tower():
    """The last output is the tower's; the attention of CLS, by hand, in a tower of one block."""
    spec = replace(VISION, depth=1)
    params = init_vit(spec, jax.random.key(0))
    image = jax.random.normal(jax.random.key(1), (2, 64, 64, 3))
    seen = encode_seen(Vit(spec), params, image, layers=True, attention=True)
    tokens = Vit(spec).apply({"params": params}, image, method="encode")
    np.testing.assert_allclose(seen.tokens_bkd, tokens, atol=1e-6)
    np.testing.assert_allclose(seen.layers_lbkd[-1], tokens, atol=1e-6)
    first = jax.tree.map(lambda x: x[0], params["blocks"])
    before = Vit(spec).apply({"params": params}, image, None, None, method="_embed")[0]
    before = np.asarray(_norm(np.asarray(before), params["embed_norm"]))
    q, k = (
        np.einsum("bnd,dhe->bnhe", _norm(before, first["norm1"]), first["attn"][name]["kernel"])
        + np.asarray(first["attn"][name]["bias"])
        for name in "qk"
    )
    logits = np.einsum("bhe,bnhe->bhn", q[:, 0], k) / 4
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(seen.cls_attention_bk, weights.mean(1), atol=1e-5)


def _norm(x, params):
    centred = x - x.mean(-1, keepdims=True)
    unit = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return unit * np.asarray(params["scale"]) + np.asarray(params["bias"])


def test_nothing_is_collected_that_was_not_asked_for():
    params = init_vit(VISION, jax.random.key(0))
    image = jnp.zeros((1, 64, 64, 3))
    run = jax.make_jaxpr(lambda p: Vit(VISION).apply({"params": p}, image, method="encode"))(params)
    asked = jax.make_jaxpr(lambda p: encode_seen(Vit(VISION), p, image, layers=True))(params)
    outputs = [
        next(e for e in jaxpr.eqns if e.primitive.name == "scan").outvars for jaxpr in (run, asked)
    ]
    assert [len(o) for o in outputs] == [1, 2]
    assert encode_seen(Vit(VISION), params, image)[1:] == (None, None)


# all of them


@pytest.mark.parametrize("name", ["mim", "distill", "maskalign"])
def test_no_gradient_reaches_the_teacher(name):
    task = _task(name, kind="attention" if name == "maskalign" else "random")
    params, frozen, key = _start(task)
    loss = OBJECTIVES[name].loss
    grads = jax.grad(lambda f: loss(params, f, {"image": _images()}, key, task)[0])(frozen)
    assert all(not leaf.any() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_tables_cover_what_an_objective_trains(name):
    """And nothing of a decoder but its maps decays or is split."""
    task = _task(name)
    params = jax.eval_shape(lambda: OBJECTIVES[name].init(jax.random.key(0), task))
    layout, decays = mesh.shardings(mesh.make_mesh(1, 8), params), decay_mask(params)
    for path, decay in jax.tree.leaves_with_path(decays.get(DECODER, {})):
        assert decay == (path[-1].key == "kernel")
    for path, place in jax.tree.leaves_with_path(layout.get(DECODER, {})):
        assert ("fsdp" in place.spec) == (path[-1].key == "kernel")


def operations(name, keep):
    """XLA's count of a loss and its gradient, blocks written out."""
    task = _task(name, keep, kind="random", unroll=True)
    params, frozen, key = _start(task)
    step = jax.value_and_grad(OBJECTIVES[name].loss, has_aux=True)
    batch = {"image": _images()}
    return jax.jit(step, static_argnums=4).lower(params, frozen, batch, key, task).cost_analysis()


def test_unmasked_tokens_alone_cost_less():
    """At half of the patches the student's part of uta is about half; the teacher's is the same."""
    counts = {
        name: operations(name, keep)["flops"]
        for name, keep in dict(uta=32, mim=32, distill=64, maskalign=32).items()
    }
    assert counts["uta"] < 0.75 * counts["mim"] and counts["uta"] < 0.75 * counts["distill"]
    assert counts["uta"] < counts["maskalign"] < counts["mim"]  # five heads instead of one


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(objective="mim", mask__kind="attention"), "kind=attention is not for .*'mim'.*block"),
        (dict(objective="mim", mask__ratio=0.0), "ratio=0.0 masks none of 64 .* raise it"),
    ],
)
def test_masks_that_an_objective_cannot_use(changes, message):
    c = _config(**changes)
    with pytest.raises(UserError, match=message):
        make_task(c, CLIP)


def _config(**changes):
    c = default_config()
    c.student.preset, c.mask.min_block = "tiny_clip", 4
    for key, value in changes.items():
        *section, leaf = key.split("__")
        (c[section[0]] if section else c)[leaf] = value
    return c


def test_what_a_student_becomes():
    """A CLIP where it lives in the teacher's space, else a tower alone, whatever teaches it."""
    assert make_task(_config(objective="mim"), CLIP).clip.text == TEXT
    assert make_task(_config(objective="distill"), CLIP).mask.keep == 64
    alone = replace(CLIP, text=None)  # no text tower is needed for it
    task = make_task(_config(objective="maskalign"), alone)
    assert task.clip.text is None and task.student.out_dim == task.student.width
    with pytest.raises(UserError, match="no text tower"):
        make_task(_config(objective="distill"), alone)
