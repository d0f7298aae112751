"""Formulas of the loss, and loads, that Triton's kernels share. Importing this needs triton."""

import triton
import triton.language as tl

# The interpreter runs kernels in numpy, which cannot multiply bfloat16.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def operand(x):
    """`x` in the dtype of its products: its own, or float32 for the interpreter's bfloat16."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        x = x.to(tl.float32)
    return x


@triton.jit
def load_block(matrix, i, k, n, d, stride_n, stride_d):
    """matrix[i, k] as a [len(i), len(k)] block, 0 beyond its n rows and d columns."""
    address = matrix + i[:, None].to(tl.int64) * stride_n + k[None, :].to(tl.int64) * stride_d
    return tl.load(address, mask=(i < n)[:, None] & (k < d)[None, :], other=0.0)


@triton.jit
def load_vector(vector, i, n, stride=1):
    return tl.load(vector + i.to(tl.int64) * stride, mask=i < n, other=0)


@triton.jit
def inverse_norm(squared, squared_eps):
    """1 / n_i from n_i^2: 0 for a zero row; NaN, not 0, where n_i^2 overflowed."""
    is_zero = squared <= squared_eps
    inverse = tl.where(is_zero, 0.0, tl.rsqrt(tl.where(is_zero, 1.0, squared)))
    return tl.where(squared == float("inf"), float("nan"), inverse)


@triton.jit
def slope_of(s, signed):
    """phi'(s): 2s for phi = s^2, 2|s| for phi = s|s|."""
    return 2 * tl.where(signed != 0, tl.abs(s), s)


@triton.jit
def phi_of(s, signed):
    return s * tl.where(signed != 0, tl.abs(s), s)
