"""Properties of the towers that no checkpoint can show."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from uta_jax.models import heads, presets
from uta_jax.models.attention import rope_table
from uta_jax.models.text import TextTower, init_text
from uta_jax.models.vit import REMAT, Vit, _gelu_by_tanh, gelu, init_vit, patchify

# One of each family, small: CLIP's traits and those of the released UTA students.
SPECS = {
    name: replace(presets.VIT[name], width=32, heads=2, mlp_hidden=48, depth=2)
    for name in ("tiny_clip", "uta_tiny")
}


def _images(batch=3, size=64, seed=0):
    return jax.random.normal(jax.random.key(seed), (batch, size, size, 3))


def _keep(batch=3, keep=24, tokens=64):
    rng = np.random.default_rng(0)
    rows = [np.sort(rng.permutation(tokens)[:keep]) for _ in range(batch)]
    return jnp.asarray(rows, jnp.int32)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_masked_out_pixels_change_nothing(spec):
    params = init_vit(spec, jax.random.key(1))
    images, keep_bk = _images(), _keep()
    shown_bn = np.zeros((3, 64), bool)
    np.put_along_axis(shown_bn, np.asarray(keep_bk), True, axis=1)
    pixels = shown_bn.reshape(3, 8, 8).repeat(8, axis=1).repeat(8, axis=2)[..., None]
    other = jnp.where(pixels, images, _images(seed=7))
    run = jax.jit(Vit(spec).apply)
    ours, theirs = (run({"params": params}, x, keep_bk) for x in (images, other))
    np.testing.assert_array_equal(ours, theirs)
    whole, changed = (run({"params": params}, x) for x in (images, other))
    assert np.abs(whole - changed).max() > 1e-3  # the pixels that changed do matter when seen


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_keeping_every_patch_is_the_whole_image(spec):
    params = init_vit(spec, jax.random.key(1))
    all_bk = jnp.broadcast_to(jnp.arange(64, dtype=jnp.int32), (3, 64))
    whole = Vit(spec).apply({"params": params}, _images())
    np.testing.assert_allclose(
        Vit(spec).apply({"params": params}, _images(), all_bk), whole, atol=1e-5
    )


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_order_of_the_kept_patches_only_orders_the_output(spec):
    """Positions travel with their patch: a permuted index list permutes the tokens."""
    params = init_vit(spec, jax.random.key(1))
    keep_bk = _keep()
    ours = Vit(spec).apply({"params": params}, _images(), keep_bk)
    reversed_ = Vit(spec).apply({"params": params}, _images(), keep_bk[:, ::-1])
    np.testing.assert_allclose(reversed_[:, 1:], ours[:, :0:-1], atol=2e-5)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_cls_apart_from_the_patches_is_the_same_tower(spec):
    params = init_vit(spec, jax.random.key(1))
    whole, apart = (Vit(spec, split=s).apply({"params": params}, _images()) for s in (False, True))
    np.testing.assert_allclose(apart, whole, atol=1e-5)
    kept = (Vit(spec, split=s).apply({"params": params}, _images(), _keep()) for s in (False, True))
    np.testing.assert_allclose(*kept, atol=1e-5)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_groups_of_images_one_after_the_other_are_the_same_tower(spec, split):
    params = init_vit(spec, jax.random.key(1))
    images = _images(6)
    whole = Vit(spec).apply({"params": params}, images)
    assert np.ptp(np.asarray(whole), axis=0).max() > 1e-3  # images differ: their order shows
    for groups in (2, 3):
        grouped = Vit(spec, split=split, groups=groups).apply({"params": params}, images)
        np.testing.assert_allclose(grouped, whole, atol=1e-5)


def test_gelu_by_tanh_over_all_of_bfloat16():
    x = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    x = x[np.isfinite(x.astype(np.float32))]
    x32 = x.astype(np.float32)
    exact = np.asarray(gelu(jnp.asarray(x32)))
    in_fp32 = np.asarray(_gelu_by_tanh(jnp.asarray(x32)))
    assert 2e-5 < np.abs(in_fp32 - exact).max() < 2.6e-5
    rounded = np.asarray(_gelu_by_tanh(jnp.asarray(x)).astype(jnp.float32))
    np.testing.assert_allclose(rounded, exact, rtol=2**-8, atol=2.6e-5)


def test_a_norm_by_products_is_the_norm():
    """Forward and backward, within what bfloat16 rounds; the mean is far from zero."""
    keys = jax.random.split(jax.random.key(0), 4)
    x, grad = (jax.random.normal(key, (4, 7, 96)).astype(jnp.bfloat16) for key in keys[:2])
    arguments = 3 * x + 5, *(jax.random.normal(key, (96,)) for key in keys[2:])
    found = []
    for norm in (heads._normed_by_products, heads._normed):
        y, back = jax.vjp(lambda *a, norm=norm: norm(*a, 1e-6).astype(jnp.bfloat16), *arguments)
        found.append([y, *back(grad)])
    for products, plain in zip(*found, strict=True):
        products, plain = np.float32(products), np.float32(plain)
        assert np.linalg.norm(products - plain) < 4e-3 * np.linalg.norm(plain)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_remat_changes_no_gradient(spec):
    params = init_vit(spec, jax.random.key(1))

    def grads(remat):
        def loss(p):
            return (Vit(spec, remat=remat).apply({"params": p}, _images()) ** 2).sum()

        return jax.jit(jax.grad(loss))(params)

    plain = grads("none")
    for remat in set(REMAT) - {"none"}:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3),
            grads(remat),
            plain,
        )


def test_bfloat16_stays_near_float32():
    spec = SPECS["uta_tiny"]
    params = init_vit(spec, jax.random.key(1))
    full = Vit(spec).apply({"params": params}, _images())
    half = Vit(spec, jnp.bfloat16).apply({"params": params}, _images())
    assert half.dtype == jnp.bfloat16
    cos = (full * half).sum(-1) / jnp.linalg.norm(full, axis=-1) / jnp.linalg.norm(half, axis=-1)
    assert cos.min() > 0.99


def test_half_of_the_tokens_cost_at_most_055_of_the_forward():
    spec = presets.VIT["uta_tiny"]
    params = init_vit(spec, jax.random.key(1))

    def flops(keep):
        # Unscanned depth would be counted in full; a scan's body is counted once in both cases.
        apply = jax.jit(lambda p, x: Vit(spec).apply({"params": p}, x, keep))
        return apply.lower(params, _images(8)).compile().cost_analysis()["flops"]

    assert flops(_keep(8, 32)) <= 0.55 * flops(None)


def test_patchify_is_row_major():
    image = np.arange(2 * 4 * 4 * 3).reshape(2, 4, 4, 3)
    patches = patchify(image, 2)
    np.testing.assert_array_equal(patches[0, 1].reshape(2, 2, 3), image[0, :2, 2:])
    np.testing.assert_array_equal(patches[1, 2].reshape(2, 2, 3), image[1, 2:, :2])


def test_rope_spans_the_same_range_at_every_resolution():
    spec = presets.VIT["uta_b16"]
    for size in (224, 336):
        cos, _ = rope_table(presets.resized(spec, size))
        assert cos.shape == (1 + (size // 16) ** 2, 64)
        np.testing.assert_array_equal(cos[0], 1.0)  # CLS does not turn
    # The middle of the image lies at the same angle on a 14 x 14 and a 28 x 28 grid.
    small, large = (rope_table(presets.resized(spec, size))[0] for size in (224, 448))
    np.testing.assert_allclose(small[1 + 7 * 14 + 7], large[1 + 14 * 28 + 14], atol=1e-5)


def test_text_features_do_not_see_what_follows_the_end():
    spec = presets.TextSpec(12, 100, 32, 2, 2, 64, 16)
    params = init_text(spec, jax.random.key(0))
    ids = jnp.array([[98, 5, 6, 99] + [0] * 8, [98, 5, 6, 99] + [3] * 8], jnp.int32)
    one, other = TextTower(spec).apply({"params": params}, ids)
    np.testing.assert_allclose(one, other, atol=1e-6)


def test_released_student_sizes():
    """Parameters of the released towers (counted in the authors' code)."""
    counts = {"uta_b16": 86_638_336, "uta_l14_336": 304_646_080, "uta_g14_336": 1_013_449_088}
    for name, count in counts.items():
        spec = presets.VIT[name]
        shapes = jax.eval_shape(lambda spec=spec: init_vit(spec, jax.random.key(0)))
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count
