"""Masks: exact counts, the distributions that each kind promises, BEiT's procedure as published."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uta_jax import masking
from uta_jax.masking import KINDS, WEIGHTED, Mask, keep_count

draw = jax.jit(masking.sample, static_argnums=(1, 2, 3))

UNIFORMS = 4 * masking._ROUNDS  # numbers that the rectangles of one mask use
GRID, HALF, DRAWS = 14, 98, 4000  # the setting of the published figures: 14 x 14, 50 %


def kept(keep_bk, grid):
    """Indices -> bool [b, grid, grid]."""
    shown = np.zeros((len(keep_bk), grid * grid), bool)
    np.put_along_axis(shown, np.asarray(keep_bk), True, axis=1)
    return shown.reshape(-1, grid, grid)


@pytest.fixture(scope="module")
def half():
    """Kind -> DRAWS visible maps."""
    return {
        kind: kept(draw(jax.random.key(n), DRAWS, GRID, Mask(kind, HALF)), GRID)
        for n, kind in enumerate(KINDS)
    }


def drawn(u_bu):
    """The rectangles alone, of half of the cells."""
    ours = jax.jit(masking.rectangles, static_argnums=(1, 2, 3))
    return np.asarray(ours(u_bu, GRID, HALF, 16))


def beit_masks(rng, draws, grid, target, smallest=16):
    """BEiT's generator as its publication describes it, in plain loops; it may stop short.

    Until ``target`` cells are covered: up to ten tries of a rectangle with an area uniform between
    ``smallest`` and what is missing, aspect log-uniform in [0.3, 1/0.3], refused unless it is
    smaller than the grid both ways and adds between one cell and the missing number. Ends early
    when ten tries fail.
    """
    masks = np.zeros((draws, grid, grid), bool)
    for mask in masks:
        failures = 0
        while failures < 10 and mask.sum() < target:
            missing = target - mask.sum()
            area = smallest + rng.random() * (missing - smallest)
            aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            failures += 1
            if height >= grid or width >= grid:
                continue
            top = rng.integers(0, grid - height, endpoint=True)
            left = rng.integers(0, grid - width, endpoint=True)
            window = mask[top : top + height, left : left + width]
            if 0 < window.size - window.sum() <= missing:
                window[:] = True
                failures = 0
    return masks


def same_neighbours(maps):
    """Share of the pairs of neighbours that are of one kind."""
    return ((maps[:, 1:] == maps[:, :-1]).mean() + (maps[:, :, 1:] == maps[:, :, :-1]).mean()) / 2


def regions(frequency):
    """(corners, outer ring, central 8 x 8) of a [14, 14] map."""
    ring = np.ones_like(frequency, bool)
    ring[1:-1, 1:-1] = False
    corners = frequency[[0, 0, -1, -1], [0, -1, 0, -1]]
    return corners.mean(), frequency[ring].mean(), frequency[3:-3, 3:-3].mean()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid, keep", [(1, 1), (7, 20), (14, 1), (14, 177)])
def test_exactly_k_sorted_distinct_indices_in_range(kind, grid, keep):
    keep_bk = np.asarray(draw(jax.random.key(keep), 64, grid, Mask(kind, keep)))
    assert keep_bk.shape == (64, keep) and keep_bk.dtype == np.int32
    assert (np.diff(keep_bk, axis=1) > 0).all(), "not sorted, or not distinct"
    assert keep_bk.min() >= 0 and keep_bk.max() < grid * grid


@pytest.mark.parametrize("kind", KINDS)
def test_keeping_all_is_the_identity(kind):
    keep_bk = np.asarray(draw(jax.random.key(0), 3, 7, Mask(kind, 49)))
    np.testing.assert_array_equal(keep_bk, np.tile(np.arange(49), (3, 1)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_key_decides_and_images_differ(kind):
    mask = Mask(kind, 32)
    first, again, other = (np.asarray(draw(jax.random.key(k), 16, 8, mask)) for k in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert len({row.tobytes() for row in first}) == 16
    assert not {row.tobytes() for row in first} & {row.tobytes() for row in other}


def test_random_draws_every_subset_equally_often():
    """84 subsets of 3 of 9 cells: a chi-square statistic with 83 degrees of freedom, 83 +- 13.

    Both bounds stand five deviations off: what is far more even than chance is not random either.
    """
    draws = 84 * 200
    keep_bk = np.asarray(draw(jax.random.key(3), draws, 3, Mask("random", 3)))
    place = {subset: n for n, subset in enumerate(itertools.combinations(range(9), 3))}
    counts = np.bincount([place[tuple(row)] for row in keep_bk.tolist()], minlength=84)
    chi_square = ((counts - 200) ** 2 / 200).sum()
    assert abs(chi_square - 83) < 5 * math.sqrt(2 * 83)


@pytest.mark.parametrize("keep", [20, HALF, 180])
def test_random_keeps_every_cell_equally_often(keep):
    """Counts are binomial: their squared deviations over their variance sum to about the cells."""
    cells, share = GRID * GRID, keep / GRID**2
    shown = kept(draw(jax.random.key(keep), DRAWS, GRID, Mask("random", keep)), GRID)
    deviation = shown.sum(0) - DRAWS * share
    statistic = (deviation**2).sum() / (DRAWS * share * (1 - share))
    assert abs(statistic - cells) < 5 * math.sqrt(2 * cells)


def test_attention_keeps_subsets_as_often_as_drawing_one_by_one_does():
    """Weights 1, 2, 3, 6: P(i, j) = w_i w_j / 12 (1 / (12 - w_i) + 1 / (12 - w_j)).

    Six subsets in 12,000 draws: a chi-square statistic with 5 degrees of freedom is below 30 in
    all but 1 of 60,000 runs, and there is one run.
    """
    weights, draws = np.array([1.0, 2.0, 3.0, 6.0]), 12_000
    weight_bn = np.tile(weights, (draws, 1)).astype(np.float32)
    mask = Mask("attention", 2)
    keep_bk = np.asarray(masking.sample(jax.random.key(0), draws, 2, mask, weight_bn))
    pairs = list(itertools.combinations(range(4), 2))
    w = weights / weights.sum()
    expected = np.array([w[i] * w[j] * (1 / (1 - w[i]) + 1 / (1 - w[j])) for i, j in pairs])
    assert expected.sum() == pytest.approx(1)
    counts = np.array([(keep_bk == pair).all(axis=1).sum() for pair in pairs])
    assert ((counts - draws * expected) ** 2 / (draws * expected)).sum() < 30


def test_a_patch_without_weight_is_kept_last():
    weight_bn = np.tile(np.arange(16) % 2, (64, 1)).astype(np.float32)
    keep_bk = np.asarray(masking.sample(jax.random.key(0), 64, 4, Mask("attention", 8), weight_bn))
    np.testing.assert_array_equal(keep_bk, np.tile(np.arange(1, 16, 2), (64, 1)))


def test_blocks_are_blocky(half):
    """Neighbours agree by chance in a random mask, seven times in eight in blocks."""
    assert same_neighbours(half["random"]) == pytest.approx(0.497, abs=0.01)  # 97 / 195
    assert same_neighbours(half["block"]) > 0.85
    assert same_neighbours(half["reversed_block"]) > 0.85


@pytest.mark.parametrize(
    "kind, published",
    [("block", (0.94, 0.80, 0.24)), ("reversed_block", (0.06, 0.20, 0.76))],
)
def test_visibility_of_corner_edge_and_centre(half, kind, published):
    """Simulated figures for BEiT's masks without top-up, given to two digits.

    Tolerance 0.02: 0.005 for their rounding, 0.005 for the top-up (half a cell of 98 on average)
    and 0.01 for chance, five standard errors of the least certain, that of the centre.
    """
    assert regions(half[kind].mean(0)) == pytest.approx(published, abs=0.02)


def test_reversed_block_keeps_what_block_drops():
    """From one key the two kinds draw the same rectangles, and at one half they are complements."""
    dropped = ~kept(draw(jax.random.key(8), 64, 8, Mask("block", 32)), 8)
    shown = kept(draw(jax.random.key(8), 64, 8, Mask("reversed_block", 32)), 8)
    np.testing.assert_array_equal(dropped, shown)


@pytest.fixture(scope="module")
def before_top_up():
    """Cells covered by rectangles alone: (BEiT's procedure in loops, ours)."""
    published = beit_masks(np.random.default_rng(0), 2 * DRAWS, GRID, HALF)
    return published, drawn(jax.random.uniform(jax.random.key(0), (DRAWS, UNIFORMS)))


def close(a, b):
    """Means of two samples within five standard errors of their difference."""
    error = math.sqrt(a.var() / len(a) + b.var() / len(b))
    assert abs(a.mean() - b.mean()) < 5 * error, (a.mean(), b.mean(), error)


def test_rectangles_follow_the_published_procedure(before_top_up):
    """Coverage, how often it is exact, length of the outline, places: equal in distribution."""
    published, ours = before_top_up
    covered = [maps.sum((1, 2)) for maps in before_top_up]
    assert max(covered[1]) == HALF, "rectangles overshot"
    close(*covered)
    close(*(cells == HALF for cells in covered))
    close(*((maps[:, 1:] != maps[:, :-1]).sum((1, 2)) for maps in before_top_up))
    # 196 frequencies, each within five standard errors of 0.0096 at most.
    assert np.abs(published.mean(0) - ours.mean(0)).max() < 0.048


def test_the_comparison_notices_another_procedure(before_top_up):
    """Else the test above could pass for anything: rectangles from 4 cells up are not BEiT's."""
    smaller = beit_masks(np.random.default_rng(1), 1000, GRID, HALF, smallest=4)
    outlines = [(m[:, 1:] != m[:, :-1]).sum((1, 2)) for m in (smaller, before_top_up[1])]
    with pytest.raises(AssertionError):
        close(*outlines)


def test_top_up_grows_the_rectangles():
    """No rectangle is trimmed, and every cell added to them touches one."""
    key, draws = jax.random.key(4), 256
    u_bu = jax.random.uniform(key, (draws, UNIFORMS + GRID**2))
    covered = drawn(u_bu[:, :UNIFORMS])
    dropped = ~kept(draw(key, draws, GRID, Mask("block", HALF)), GRID)
    assert (dropped | ~covered).all()
    added = dropped & ~covered
    assert added.any()
    near = np.pad(covered, ((0, 0), (1, 1), (1, 1)))
    near = near[:, :-2, 1:-1] | near[:, 2:, 1:-1] | near[:, 1:-1, :-2] | near[:, 1:-1, 2:]
    assert (near | ~added).all()


def test_the_loop_is_long_enough():
    """With twice the rounds no rectangle more is drawn, on the largest grid and mask in use."""
    u_bu = jax.random.uniform(jax.random.key(0), (512, 2 * UNIFORMS))
    largest = 24, 403, 16  # 336 px in patches of 14, 70 %
    ours = jax.jit(masking.rectangles, static_argnums=(1, 2, 3))
    once, twice = ours(u_bu[:, :UNIFORMS], *largest), ours(u_bu, *largest)
    assert once.any()
    np.testing.assert_array_equal(once, twice)


@pytest.mark.parametrize(
    "tokens, ratio, keep", [(196, 0.5, 98), (64, 0.0, 64), (64, 0.999, 0), (256, 105 / 256, 151)]
)
def test_keep_count(tokens, ratio, keep):
    assert keep_count(tokens, ratio) == keep


@pytest.mark.parametrize("kind", KINDS + WEIGHTED)
def test_parts_of_a_batch_are_masked_as_the_whole(kind):
    """Part i of a batch has its examples i, i + parts, ..."""
    key, parts, mask = jax.random.key(3), 4, Mask(kind, 8, 2)
    weight_bn = jax.random.uniform(key, (16, 16)) if kind in WEIGHTED else None
    whole_bk = masking.sample(key, 16, 4, mask, weight_bn)
    for i in range(parts):
        weight = None if weight_bn is None else weight_bn[i::parts]
        share = masking.Share(key, jnp.int32(i), parts)
        part_bk = masking.sample(share, 16 // parts, 4, mask, weight)
        np.testing.assert_array_equal(part_bk, whole_bk[i::parts])
