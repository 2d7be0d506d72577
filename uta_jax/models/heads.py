"""What stands on top of a tower: the projection of tokens into the joint space, and decoders."""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from uta_jax import mesh


def gathered(*arrays: Array | None, dtype=None, name: str = "") -> list[Array | None]:
    """Promote (inputs, kernel, bias) to the compute dtype and gather the kernel's shards.

    ``name``: of the kernel, as ``mesh.gather`` takes it.

    In this order: what crosses the wire is the cast copy. It stands in the place of Linen's own
    ``promote_dtype`` in every linear map.
    """
    inputs, kernel, bias = nn.dtypes.promote_dtype(*arrays, dtype=dtype)
    return [inputs, mesh.gather(kernel, name), bias]


def flat_dot_general(lhs, rhs, dimension_numbers, **kwargs) -> Array:
    """``lax.dot_general`` of [..., inputs] x [inputs, ...] as one two-dimensional product.

    XLA:CPU runs its gradient two to four times as fast as that of the product as it stands. The TPU
    compiler gets the latter: flat, it copies what does not fill whole tiles (197 tokens, heads of
    88) to another layout. By its own estimate the backward pass of a UTA-g block is 9 % shorter on
    v5p, and an EVA01-g teacher's layer 8 % on v5e.
    """

    def flat(lhs, rhs):
        (lhs_axes, rhs_axes), _ = dimension_numbers
        inputs = math.prod(rhs.shape[axis] for axis in rhs_axes)
        lead, out = lhs.shape[: lhs.ndim - len(lhs_axes)], rhs.shape[len(rhs_axes) :]
        lhs, rhs = lhs.reshape(-1, inputs), rhs.reshape(inputs, -1)
        product = jax.lax.dot_general(lhs, rhs, (((1,), (0,)), ((), ())), **kwargs)
        return product.reshape(*lead, *out)

    whole = partial(jax.lax.dot_general, dimension_numbers=dimension_numbers, **kwargs)
    return jax.lax.platform_dependent(lhs, rhs, tpu=whole, default=flat)


def dense(
    features, *, use_bias=True, axis=-1, gain=1.0, dtype=None, name=None, inside: tuple = ()
) -> nn.DenseGeneral:
    """A linear map with xavier-normal kernel whose shards are gathered where it is used.

    ``inside``: path of the module that holds it, where the map is split over ``tensor``. ``gain``
    multiplies the standard deviation. EVA-02 draws its linear maps this way (baaivision/EVA,
    EVA-02/asuka/modeling_pretrain.py).
    """
    kernel = "/".join((*inside, name, "kernel")) if inside else ""
    return nn.DenseGeneral(
        features,
        axis=axis,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=nn.initializers.variance_scaling(gain**2, "fan_avg", "normal"),
        promote_dtype=partial(gathered, name=kernel),
        dot_general=flat_dot_general,
        name=name,
    )


def _normed(x: Array, scale: Array, bias: Array, eps: float) -> Array:
    """LayerNorm over the last axis: [..., d] -> fp32 [..., d].

    Two-pass variance: E[x^2] - E[x]^2 loses every digit on the low-variance tokens that teachers do
    emit, and parity with PyTorch goes with it.
    """
    x = x.astype(jnp.float32)
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    return _affine(centred, variance, scale, bias, eps)


def _affine(centred: Array, variance: Array, scale: Array, bias: Array, eps: float) -> Array:
    lead = (None,) * (centred.ndim - 1)
    return centred * (jax.lax.rsqrt(variance + eps) * scale[lead]) + bias[lead]


def _mean_by_product(x: Array) -> Array:
    """The mean over the last axis, by the matrix unit: bfloat16 [..., d] -> fp32 [..., 1].

    Sums over lanes are the slowest thing a TPU does: the compiler's estimate of a whole UTA-B/16
    step is a sixth lower this way. 128 equal columns, since a single one is turned into a sum
    again. Products with one are exact and accumulate in fp32.
    """
    ones = jnp.ones((x.shape[-1], 128), x.dtype)
    return jnp.matmul(x, ones, preferred_element_type=jnp.float32)[..., :1] / x.shape[-1]


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _normed_by_products(x: Array, scale: Array, bias: Array, eps: float) -> Array:
    """``_normed`` of bfloat16 ``x`` in bfloat16, its means by products, forward and backward.

    Of what is averaged, all but ``x`` is rounded first, by 2^-9 at most. Written out, the backward
    pass goes over memory less often: by the compiler's estimate a UTA-B/16 block is 4 % shorter.
    """
    return _forward(x, scale, bias, eps)[0]


def _forward(x: Array, scale: Array, bias: Array, eps: float) -> tuple[Array, tuple]:
    mean = _mean_by_product(x)
    centred = x.astype(jnp.float32) - mean
    variance = _mean_by_product(jnp.square(centred).astype(x.dtype))
    y = _affine(centred, variance, scale, bias, eps).astype(x.dtype)
    return y, (x, mean, jax.lax.rsqrt(variance + eps), scale)


def _backward(eps: float, saved: tuple, grad: Array) -> tuple[Array, Array, Array]:
    """With u = (x - mean) / std, g = grad scale: dx = (g - mean(g) - u mean(g u)) / std."""
    x, mean, rstd, scale = saved
    unit, grad = (x.astype(jnp.float32) - mean) * rstd, grad.astype(jnp.float32)
    scaled = grad * scale[(None,) * (x.ndim - 1)]
    along = unit * _mean_by_product((scaled * unit).astype(x.dtype))
    dx = (scaled - _mean_by_product(scaled.astype(x.dtype)) - along) * rstd
    tokens = tuple(range(x.ndim - 1))
    return dx.astype(x.dtype), (grad * unit).sum(tokens), grad.sum(tokens)


_normed_by_products.defvjp(_forward, _backward)


class LayerNorm(nn.Module):
    """LayerNorm over the last axis with fp32 statistics."""

    eps: float
    dtype: jnp.dtype | None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., d] -> [..., d] in ``dtype``."""
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        dtype = self.dtype or x.dtype

        def plain(*args: Array) -> Array:
            return _normed(*args, self.eps).astype(dtype)

        if not (x.dtype == dtype == jnp.bfloat16):
            return plain(x, scale, bias)
        return jax.lax.platform_dependent(
            x, scale, bias, tpu=lambda *args: _normed_by_products(*args, self.eps), default=plain
        )


def layer_norm(eps: float, dtype=None, name=None) -> LayerNorm:
    """The LayerNorm of every tower."""
    return LayerNorm(eps, dtype, name=name)


class TokenHead(nn.Module):
    """``project(norm(tokens))``: the same map for CLS and for every patch token."""

    out_dim: int | None  # None: the norm alone
    ln_eps: float
    use_bias: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, tokens_bnd: Array) -> Array:
        """[..., d] tokens before the final norm -> [..., e] in the joint space, not normalised."""
        tokens_bnd = layer_norm(self.ln_eps, self.dtype, "norm")(tokens_bnd)
        if self.out_dim is None:
            return tokens_bnd
        return dense(self.out_dim, use_bias=self.use_bias, dtype=self.dtype, name="proj")(
            tokens_bnd
        )


class LayerHeads(nn.Module):
    """Predicts layers of a teacher from all layers of a student (MaskAlign's dynamic alignment).

        prediction_m = (sum_l W_ml layer_l) A_m + c_m

    W starts as the last rows of I + 0.01 where both towers have as many layers, else as the mean
    (OpenDriveLab/maskalign, models_pretrain.py, ``distill_weights``).
    """

    teacher_depth: int
    targets: int  # the last so many of the teacher's layers
    out_dim: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, layers_lbkd: Array) -> Array:
        """[l, b, k, d] -> [targets, b, k, out_dim]."""
        depth, width = layers_lbkd.shape[0], layers_lbkd.shape[-1]
        mix = self.param("mix", lambda _: self._first_mix(depth)).astype(self.dtype)
        # Stacked maps: the first axis counts them and is no fan.
        init = nn.initializers.variance_scaling(1.0, "fan_avg", "normal", batch_axis=(0,))
        kernel = self.param("kernel", init, (self.targets, width, self.out_dim))
        bias = self.param("bias", nn.initializers.zeros, (self.targets, self.out_dim))
        mixed_mbkd = jnp.einsum("ml,lbkd->mbkd", mix, layers_lbkd)
        kernel = mesh.gather(kernel.astype(self.dtype))
        predicted = jnp.einsum("mbkd,mdt->mbkt", mixed_mbkd, kernel)
        return predicted + bias.astype(self.dtype)[:, None, None]

    def _first_mix(self, depth: int) -> Array:
        if depth != self.teacher_depth:
            return jnp.full((self.targets, depth), 1 / depth)
        return jnp.eye(depth)[-self.targets :] + 0.01
