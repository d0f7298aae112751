"""Triton kernels for at most 64 rows; `small` launches them. Importing this needs triton.

They take embeddings and labels as these are stored. Index names follow the loss's formulas: i and
j run over rows, k over the embedding's dimension. Kernels are compiled once for a dtype and a block
shape: n is never specialised on, so a ragged batch compiles nothing.
"""

import triton
import triton.language as tl

from .formulas import inverse_norm, load_block, load_vector, operand, phi_of, slope_of


@triton.jit(do_not_specialize=["n"])
def batch_products(
    embeddings,
    partial,
    n,
    d,
    stride_n,
    stride_d,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """partial[p] = the products of a batch of at most BLOCK_N float32 rows over BLOCK_D of D.

    f = high + middle + low, three bfloat16 numbers, which have float32's range whatever the norms:
    f f^T = high high^T + middle middle^T + X + X^T with X = (middle + low) high^T. Reads n BLOCK_D
    elements; 4 products of 2 n^2 BLOCK_D FLOPs. Bound by latency, hence one step a program.
    """
    acc: tl.constexpr = partial.dtype.element_ty
    i = tl.arange(0, BLOCK_N)
    k = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    f = load_block(embeddings, i, k, n, d, stride_n, stride_d)
    high = f.to(tl.bfloat16)
    middle = (f - high.to(acc)).to(tl.bfloat16)
    low = operand((f - high.to(acc) - middle.to(acc)).to(tl.bfloat16))
    high, middle = operand(high), operand(middle)
    products = tl.dot(middle, tl.trans(middle), out_dtype=acc)
    products = tl.dot(high, tl.trans(high), products, out_dtype=acc)
    cross = tl.dot(low, tl.trans(high), out_dtype=acc)
    cross = tl.dot(middle, tl.trans(high), cross, out_dtype=acc)
    at = tl.program_id(0) * BLOCK_N * BLOCK_N + i[:, None] * BLOCK_N + i[None, :]
    tl.store(partial + at, products + (cross + tl.trans(cross)))


@triton.jit(do_not_specialize=["n", "parts", "signed", "mean", "wants_gradient"])
def loss_and_gradient(
    embeddings,
    labels,
    partial,
    loss,
    positive,
    negative,
    gradient,
    n,
    d,
    parts,
    stride_n,
    stride_d,
    stride_label,
    margin: tl.float64,
    squared_eps: tl.float64,
    sigma,
    signed,
    mean,
    wants_gradient,
    PRECISION: tl.constexpr,
    SUMMED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The whole loss of a batch of at most BLOCK_N rows, and one slice of dL/df.

    One program: reads all embeddings once (n d elements), forms S in registers (2 n^2 d FLOPs),
    and writes the columns [p BLOCK_V, (p + 1) BLOCK_V) of the gradient for unit upstream gradient
    (2 n^2 BLOCK_V FLOPs). Program 0 also writes the loss and the two means of Eq. 3. S costs less
    than one synchronisation between programs would. Bound by launch and by the latency of the loop
    over D: at n = 36 the embeddings lie in L2. Hence few deep steps over D and narrow slices.

    SUMMED: products come in `parts` from `batch_products`. A step of an exact float32 product takes
    3 us on an H200, six times a half-precision one, and each of these programs would take all steps
    one after another.
    """
    acc: tl.constexpr = loss.dtype.element_ty
    i = tl.arange(0, BLOCK_N)
    raw = tl.zeros((BLOCK_N, BLOCK_N), dtype=acc)
    if SUMMED:
        at = i[:, None] * BLOCK_N + i[None, :]
        for first in range(0, parts, 4):
            for p in tl.static_range(4):
                address = partial + (first + p) * BLOCK_N * BLOCK_N + at
                raw += tl.load(address, mask=(first + p < parts) & (at >= 0), other=0.0)
    else:
        for start in range(0, d, BLOCK_D):
            k = start + tl.arange(0, BLOCK_D)
            f = operand(load_block(embeddings, i, k, n, d, stride_n, stride_d))
            raw = tl.dot(f, tl.trans(f), raw, input_precision=PRECISION, out_dtype=acc)

    label = load_vector(labels, i, n, stride_label)
    same = label[:, None] == label[None, :]
    off_diagonal = i[:, None] != i[None, :]
    pair = off_diagonal & (i < n)[:, None] & (i < n)[None, :]
    squared = tl.sum(tl.where(off_diagonal, 0.0, raw), axis=1)
    inverse = inverse_norm(squared, tl.full((), squared_eps, acc))
    s = raw * inverse[:, None] * inverse[None, :]

    phi = phi_of(s, signed)
    n_positive = tl.sum((pair & same).to(acc), axis=1)
    n_negative = tl.sum((pair & ~same).to(acc), axis=1)
    positive_mean = tl.sum(tl.where(pair & same, phi, 0.0), axis=1) / tl.maximum(n_positive, 1.0)
    negative_mean = tl.sum(tl.where(pair & ~same, phi, 0.0), axis=1) / tl.maximum(n_negative, 1.0)
    h = tl.full((), margin, acc) - positive_mean + sigma * negative_mean
    inactive = (h <= 0) | (i >= n)
    scale = tl.where(mean != 0, 1.0 / n.to(acc), 1.0)
    part = tl.program_id(0)
    if part == 0:
        # summed as a row of a matrix: Triton 3.6 cannot lay out the sum of a vector on Blackwell
        total = tl.sum(tl.where(inactive, 0.0, h)[None, :], axis=1) * scale
        tl.store(loss + tl.arange(0, 1), total)
        tl.store(positive + i, positive_mean, mask=i < n)
        tl.store(negative + i, negative_mean, mask=i < n)

    if wants_gradient != 0:
        # w_ij phi'(s_ij) / n_j off the diagonal; on it, row i's sum is made orthogonal to f_i
        p = tl.where(inactive, 0.0, -scale / tl.maximum(n_positive, 1.0))
        q = tl.where(inactive, 0.0, sigma * scale / tl.maximum(n_negative, 1.0))
        w = tl.where(same, p[:, None] + p[None, :], q[:, None] + q[None, :])
        w = tl.where(pair, w * slope_of(s, signed), 0.0)
        w = w * inverse[None, :]
        along = tl.sum(w * raw, axis=1) * inverse * inverse  # from the same weights
        w = tl.where(off_diagonal, w, -along[:, None])
        k = part * BLOCK_V + tl.arange(0, BLOCK_V)
        f = load_block(embeddings, i, k, n, d, stride_n, stride_d).to(acc)
        v = tl.dot(w, f, input_precision=PRECISION, out_dtype=acc) * inverse[:, None]
        out = gradient + i[:, None].to(tl.int64) * d + k[None, :]
        tl.store(out, v, mask=(i < n)[:, None] & (k < d)[None, :])
