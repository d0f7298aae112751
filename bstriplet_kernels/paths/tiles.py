"""Triton kernels of impl="triton"; `fused` launches them. Importing this module needs triton.

Index names follow DESIGN: i runs over rows, j over the columns they are compared with (the rows
themselves, `own`, or `ref_emb`), k over the embedding's dimension. Every address is formed in 64
bits. Kernels are compiled once for a dtype and a block shape: n and m are never specialised on, so
a ragged batch compiles nothing. Where rows are loaded again and again (`row_sums`,
`tile_gradient`), they are contiguous, start at multiples of 16 elements and are as long: loads then
take 16 bytes and few registers.

Products take embeddings as they are stored, never normalised: s_ij = (f_i . f_j) / (n_i n_j).
Half-precision products are exact in the float32 accumulator; float32 ones follow PRECISION.
"""

import triton
import triton.language as tl

# numpy, which runs kernels in the interpreter, has no bfloat16 to multiply in.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _operand(x):
    """`x` in the dtype that it is multiplied in: its own, but for the interpreter's bfloat16."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        x = x.to(tl.float32)
    return x


@triton.jit
def _load_block(matrix, i, k, n, d, stride_n, stride_d=1):
    """matrix[i, k] as a [len(i), len(k)] block, 0 beyond its n rows and d columns."""
    address = matrix + i[:, None].to(tl.int64) * stride_n + k[None, :].to(tl.int64) * stride_d
    return tl.load(address, mask=(i < n)[:, None] & (k < d)[None, :], other=0.0)


@triton.jit
def _load_vector(vector, i, n, stride=1):
    return tl.load(vector + i.to(tl.int64) * stride, mask=i < n, other=0)


@triton.jit
def _inverse_norm(squared, squared_eps):
    """1 / n_i from n_i^2: 0 for a zero row; NaN, not 0, where n_i^2 overflowed."""
    is_zero = squared <= squared_eps
    inverse = tl.where(is_zero, 0.0, tl.rsqrt(tl.where(is_zero, 1.0, squared)))
    return tl.where(squared == float("inf"), float("nan"), inverse)


@triton.jit
def _phi_slope(s, signed):
    """phi'(s): 2s for phi = s^2, 2|s| for phi = s|s|."""
    return 2 * tl.where(signed != 0, tl.abs(s), s)


@triton.jit
def _phi(s, signed):
    return s * tl.where(signed != 0, tl.abs(s), s)


@triton.jit
def _weight_operand(w, element: tl.constexpr, PRECISION: tl.constexpr):
    """Weights in the dtype in which they meet embeddings stored as `element`.

    bfloat16 keeps float32's range, so bfloat16 weights do. float16 does not: its embeddings are
    raised to float32 (tf32 holds every float16 exactly). Rounding happens here, visibly, so that
    the projection can be computed from the very weights that are multiplied.
    """
    if element == tl.bfloat16:
        w = _operand(w.to(tl.bfloat16))
    elif PRECISION == "tf32" and element != tl.float64:
        w = (w.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return w


@triton.jit
def _tf32(x):
    """float32 rounded to the nearest tf32, half-way cases away from 0."""
    return ((x.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["n", "signed", "mean", "wants_gradient"])
def loss_and_gradient(
    embeddings,
    labels,
    loss,
    positive,
    negative,
    gradient,
    n,
    d,
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
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The whole loss of a batch of at most BLOCK_N rows, and one slice of dL/df.

    One program: reads all embeddings once (n d elements), forms S in registers (2 n^2 d FLOPs),
    and writes the columns [p BLOCK_V, (p + 1) BLOCK_V) of the gradient for unit upstream gradient
    (2 n^2 BLOCK_V FLOPs). Program 0 also writes the loss and the two means of Eq. 3. S costs less
    than one synchronisation between programs would. Bound by launch and by the latency of the loop
    over D: at n = 36 the embeddings lie in L2. Hence few deep steps over D and narrow slices: ten
    steps and forty programs at D = 1,280.

    Exact float32 products are of f = high + low, two tf32 numbers: S = high high^T + X + X^T with
    X = low high^T, two products where Triton's "tf32x3" takes three. low low^T is below 2^-22.
    """
    acc: tl.constexpr = loss.dtype.element_ty
    split: tl.constexpr = PRECISION == "tf32x3" and embeddings.dtype.element_ty == tl.float32
    i = tl.arange(0, BLOCK_N)
    raw = tl.zeros((BLOCK_N, BLOCK_N), dtype=acc)
    cross = tl.zeros((BLOCK_N, BLOCK_N), dtype=acc)
    for start in range(0, d, BLOCK_D):
        k = start + tl.arange(0, BLOCK_D)
        f = _operand(_load_block(embeddings, i, k, n, d, stride_n, stride_d))
        if split:
            high = _tf32(f)
            raw = tl.dot(high, tl.trans(high), raw, input_precision="tf32", out_dtype=acc)
            cross = tl.dot(f - high, tl.trans(high), cross, input_precision="tf32", out_dtype=acc)
        else:
            raw = tl.dot(f, tl.trans(f), raw, input_precision=PRECISION, out_dtype=acc)
    if split:
        raw += cross + tl.trans(cross)

    label = _load_vector(labels, i, n, stride_label)
    same = label[:, None] == label[None, :]
    off_diagonal = i[:, None] != i[None, :]
    pair = off_diagonal & (i < n)[:, None] & (i < n)[None, :]
    squared = tl.sum(tl.where(off_diagonal, 0.0, raw), axis=1)
    inverse = _inverse_norm(squared, tl.full((), squared_eps, acc))
    s = raw * inverse[:, None] * inverse[None, :]

    phi = _phi(s, signed)
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
        # w_ij phi'(s_ij) / n_j off the diagonal; on it what makes row i's sum orthogonal to f_i
        p = tl.where(inactive, 0.0, -scale / tl.maximum(n_positive, 1.0))
        q = tl.where(inactive, 0.0, sigma * scale / tl.maximum(n_negative, 1.0))
        w = tl.where(same, p[:, None] + p[None, :], q[:, None] + q[None, :])
        w = tl.where(pair, w * _phi_slope(s, signed), 0.0)
        along = tl.sum(w * s, axis=1) * inverse
        w = tl.where(off_diagonal, w * inverse[None, :], -along[:, None])
        k = part * BLOCK_V + tl.arange(0, BLOCK_V)
        f = _load_block(embeddings, i, k, n, d, stride_n, stride_d).to(acc)
        v = tl.dot(w, f, input_precision=PRECISION, out_dtype=acc) * inverse[:, None]
        out = gradient + i[:, None].to(tl.int64) * d + k[None, :]
        tl.store(out, v, mask=(i < n)[:, None] & (k < d)[None, :])


@triton.jit(do_not_specialize=["n"])
def inverse_norms(
    embeddings,
    inverse,
    n,
    d,
    stride_n,
    stride_d,
    squared_eps: tl.float64,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """1 / n_i of BLOCK_N rows: reads n d elements once, writes n. Bound by memory."""
    acc: tl.constexpr = inverse.dtype.element_ty
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    squared = tl.zeros((BLOCK_N, BLOCK_D), dtype=acc)
    for start in range(0, d, BLOCK_D):
        k = start + tl.arange(0, BLOCK_D)
        f = _load_block(embeddings, i, k, n, d, stride_n, stride_d).to(acc)
        squared += f * f
    total = tl.sum(squared, axis=1)
    tl.store(inverse + i, _inverse_norm(total, tl.full((), squared_eps, acc)), mask=i < n)


@triton.jit
def _projections(
    rows,
    columns,
    row_inverse,
    i,
    j,
    n,
    m,
    d,
    stride,
    column_stride,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(f_i . f_j) / n_i as a [len(i), len(j)] block: s_ij but for the column's norm."""
    acc: tl.constexpr = row_inverse.dtype
    raw = tl.zeros((i.shape[0], j.shape[0]), dtype=acc)
    for start in range(0, d, BLOCK_D):
        k = start + tl.arange(0, BLOCK_D)
        f_i = _operand(_load_block(rows, i, k, n, d, stride))
        f_j = _operand(_load_block(columns, j, k, m, d, column_stride))
        raw = tl.dot(f_i, tl.trans(f_j), raw, input_precision=PRECISION, out_dtype=acc)
    return raw * row_inverse[:, None]


@triton.jit
def _share(count, parts, part):
    """[first, last) of `count` tiles for one of `parts` programs."""
    each = tl.cdiv(count, parts)
    return part * each, tl.minimum((part + 1) * each, count)


@triton.jit(do_not_specialize=["n", "m", "own", "signed"])
def row_sums(
    rows,
    columns,
    row_labels,
    column_labels,
    row_inverse,
    column_inverse,
    sums,
    counts,
    n,
    m,
    d,
    stride,
    column_stride,
    own,
    signed,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums of phi(s_ij) over P_i and over Q_i, and |P_i|, for BLOCK_N rows and a share of columns.

    Program (r, p) walks the p-th share of the column tiles and writes sums[0, p, i], sums[1, p, i]
    and counts[p, i]: 2 n m d FLOPs in all, nothing of size n m is stored. Bound by the products.
    """
    acc: tl.constexpr = row_inverse.dtype.element_ty
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    label_i = _load_vector(row_labels, i, n)
    inverse_i = _load_vector(row_inverse, i, n)
    positive = tl.zeros((BLOCK_N,), dtype=acc)
    negative = tl.zeros((BLOCK_N,), dtype=acc)
    count = tl.zeros((BLOCK_N,), dtype=tl.int32)
    first, last = _share(tl.cdiv(m, BLOCK_M), parts, part)
    for tile in range(first, last):
        j = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        projection = _projections(
            rows,
            columns,
            inverse_i,
            i,
            j,
            n,
            m,
            d,
            stride,
            column_stride,
            PRECISION,
            BLOCK_D,
        )
        phi = _phi(projection * _load_vector(column_inverse, j, m)[None, :], signed)
        same = label_i[:, None] == _load_vector(column_labels, j, m)[None, :]
        pair = (j < m)[None, :] & ((own == 0) | (i[:, None] != j[None, :]))
        positive += tl.sum(tl.where(pair & same, phi, 0.0), axis=1)
        negative += tl.sum(tl.where(pair & ~same, phi, 0.0), axis=1)
        count += tl.sum((pair & same).to(tl.int32), axis=1)
    at = part.to(tl.int64) * n + i
    tl.store(sums + at, positive, mask=i < n)
    tl.store(sums + parts.to(tl.int64) * n + at, negative, mask=i < n)
    tl.store(counts + at, count, mask=i < n)


@triton.jit(do_not_specialize=["n", "m", "parts", "own"])
def finish_rows(
    sums,
    counts,
    loss,
    positive,
    negative,
    pull,
    n,
    m,
    parts,
    own,
    margin: tl.float64,
    sigma,
    REDUCTION: tl.constexpr,
    MAX_PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Eq. 3's means, the hinge and the reduction, from the partial sums of `row_sums`.

    One program walks all rows, so that the sum over rows has one order: reads 3 parts n numbers,
    writes 4 n. pull[0, i] and pull[1, i] are what row i's pairs weigh in dL/dS for dL/dl_i = 1:
    -1/N_i+ and sigma/N_i-, over N for the mean, 0 where h_i <= 0.
    """
    acc: tl.constexpr = sums.dtype.element_ty
    scale = 1.0 / n.to(acc) if REDUCTION == "mean" else 1.0
    part = tl.arange(0, MAX_PARTS)
    total = tl.zeros((BLOCK_N,), dtype=acc)
    for start in range(0, n, BLOCK_N):
        i = start + tl.arange(0, BLOCK_N)
        at = part[:, None].to(tl.int64) * n + i[None, :]
        mask = (part < parts)[:, None] & (i < n)[None, :]
        n_positive = tl.sum(tl.load(counts + at, mask=mask, other=0), axis=0)
        n_negative = m - own - n_positive
        n_positive = tl.maximum(n_positive, 1).to(acc)
        n_negative = tl.maximum(n_negative, 1).to(acc)
        positive_mean = tl.sum(tl.load(sums + at, mask=mask, other=0.0), axis=0) / n_positive
        at += parts.to(tl.int64) * n
        negative_mean = tl.sum(tl.load(sums + at, mask=mask, other=0.0), axis=0) / n_negative
        h = tl.full((), margin, acc) - positive_mean + sigma * negative_mean
        inactive = (h <= 0) | (i >= n)
        row_loss = tl.where(inactive, 0.0, h)
        total += row_loss
        if REDUCTION == "none":
            tl.store(loss + i, row_loss, mask=i < n)
        tl.store(positive + i, positive_mean, mask=i < n)
        tl.store(negative + i, negative_mean, mask=i < n)
        tl.store(pull + i, tl.where(inactive, 0.0, -scale / n_positive), mask=i < n)
        at_negative = n.to(tl.int64) + i
        tl.store(
            pull + at_negative, tl.where(inactive, 0.0, sigma * scale / n_negative), mask=i < n
        )
    if REDUCTION != "none":
        tl.store(loss, tl.sum(total, axis=0) * scale)


@triton.jit
def _load_pull(pull, upstream, i, n, stride):
    """Row i's weight on its positives and on its negatives, exactly 0 where it is inactive."""
    p = _load_vector(pull, i, n)
    q = _load_vector(pull + n.to(tl.int64), i, n)
    g = tl.load(upstream + i.to(tl.int64) * stride, mask=(p != 0) | (q != 0), other=0)
    return p * g, q * g


@triton.jit
def _any_active(pull, i, n):
    """1 where a row of the tile has h_i > 0, else 0."""
    p = _load_vector(pull, i, n)
    q = _load_vector(pull + n.to(tl.int64), i, n)
    return tl.max(((p != 0) | (q != 0)).to(tl.int32), axis=0)


@triton.jit(do_not_specialize=["n", "m", "own", "signed", "upstream_stride"])
def tile_gradient(
    rows,
    columns,
    row_labels,
    column_labels,
    row_inverse,
    column_inverse,
    row_pull,
    column_pull,
    upstream,
    gradient,
    n,
    m,
    d,
    stride,
    column_stride,
    upstream_stride,
    own,
    signed,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """BLOCK_V columns of dL/df_i for BLOCK_N rows, from a share of the columns j.

    Program (r, c, p) recomputes the tiles of S (2 d FLOPs a pair) and multiplies their weights with
    f_j (2 BLOCK_V a pair). The normalisation's backward, (v_i - (v_i . f^_i) f^_i) / n_i, is linear
    in v, so each program ends with its own: v_i . f^_i is a row sum of the same tiles. A tile
    between rows and columns that are all inactive is exactly 0 and is passed over. Writes
    gradient[p, i, k]. Bound by the products.
    """
    acc: tl.constexpr = row_inverse.dtype.element_ty
    element: tl.constexpr = rows.dtype.element_ty
    part = tl.program_id(2)
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    label_i = _load_vector(row_labels, i, n)
    inverse_i = _load_vector(row_inverse, i, n)
    p_i, q_i = _load_pull(row_pull, upstream, i, n, upstream_stride)
    row_active = _any_active(row_pull, i, n)
    v = tl.zeros((BLOCK_N, BLOCK_V), dtype=acc)
    along = tl.zeros((BLOCK_N,), dtype=acc)
    first, last = _share(tl.cdiv(m, BLOCK_M), tl.num_programs(2), part)
    for tile in range(first, last):
        j = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        if row_active + _any_active(column_pull, j, m) > 0:
            projection = _projections(
                rows,
                columns,
                inverse_i,
                i,
                j,
                n,
                m,
                d,
                stride,
                column_stride,
                PRECISION,
                BLOCK_D,
            )
            inverse_j = _load_vector(column_inverse, j, m)[None, :]
            label_j = _load_vector(column_labels, j, m)
            p_j, q_j = _load_pull(column_pull, upstream, j, m, upstream_stride)
            same = label_i[:, None] == label_j[None, :]
            pair = (j < m)[None, :] & ((own == 0) | (i[:, None] != j[None, :]))
            w = tl.where(same, p_i[:, None] + p_j[None, :], q_i[:, None] + q_j[None, :])
            w = w * _phi_slope(projection * inverse_j, signed) * inverse_j
            w = _weight_operand(tl.where(pair, w, 0.0), element, PRECISION)
            along += tl.sum(w.to(acc) * projection, axis=1)
            f_j = _load_block(columns, j, k, m, d, column_stride).to(w.dtype)
            v = tl.dot(w, f_j, v, input_precision=PRECISION, out_dtype=acc)
    f_i = _load_block(rows, i, k, n, d, stride).to(acc)
    v = (v - f_i * (along * inverse_i)[:, None]) * inverse_i[:, None]
    out = gradient + (part.to(tl.int64) * n + i[:, None]) * d + k[None, :]
    tl.store(out, v, mask=(i < n)[:, None] & (k < d)[None, :])


@triton.jit
def _scaled_panel(raw, row_rest, column_rest, i, j, n, m, stride):
    """s_ij as a [len(i), len(j)] block of a panel, 0 beyond it."""
    s = _load_block(raw, i, j, n, m, stride)
    return s * _load_vector(row_rest, i, n)[:, None] * _load_vector(column_rest, j, m)[None, :]


@triton.jit
def _store_sums(sums, channel, tile, tiles, total, i, n):
    """sums[channel, tile, i] = total."""
    at = (channel * tiles + tile).to(tl.int64) * n + i
    tl.store(sums + at, total, mask=i < n)


@triton.jit(do_not_specialize=["n", "m", "own", "signed"])
def panel_sums(
    raw,
    row_labels,
    column_labels,
    row_rest,
    column_rest,
    by_row,
    by_column,
    n,
    m,
    stride,
    own,
    signed,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Sums over one tile of a panel [n, m] of S: of phi(s_ij) over P_i and Q_i, and |P_i|.

    Program (r, c) writes by_row[:, c, i], its sums over columns, and, where the panel begins at its
    own diagonal block, by_column[:, r, j], its sums over rows. Reads the panel once: bound by
    memory, or by the second-level cache where the panel is in it.
    """
    acc: tl.constexpr = raw.dtype.element_ty
    row_tile, column_tile = tl.program_id(0), tl.program_id(1)
    i = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    j = column_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    phi = _phi(_scaled_panel(raw, row_rest, column_rest, i, j, n, m, stride), signed)
    same = _load_vector(row_labels, i, n)[:, None] == _load_vector(column_labels, j, m)[None, :]
    pair = (i < n)[:, None] & (j < m)[None, :] & ((own == 0) | (i[:, None] != j[None, :]))
    positive = tl.where(pair & same, phi, 0.0)
    negative = tl.where(pair & ~same, phi, 0.0)
    count = (pair & same).to(acc)
    tiles = tl.num_programs(1)
    _store_sums(by_row, 0, column_tile, tiles, tl.sum(positive, axis=1), i, n)
    _store_sums(by_row, 1, column_tile, tiles, tl.sum(negative, axis=1), i, n)
    _store_sums(by_row, 2, column_tile, tiles, tl.sum(count, axis=1), i, n)
    if own != 0:
        tiles = tl.num_programs(0)
        _store_sums(by_column, 0, row_tile, tiles, tl.sum(positive, axis=0), j, m)
        _store_sums(by_column, 1, row_tile, tiles, tl.sum(negative, axis=0), j, m)
        _store_sums(by_column, 2, row_tile, tiles, tl.sum(count, axis=0), j, m)


@triton.jit(do_not_specialize=["n", "m", "height", "row_stride", "column_stride", "own", "signed"])
def panel_weights(
    raw,
    weights,
    row_labels,
    column_labels,
    row_rest,
    column_rest,
    row_pull,
    column_pull,
    n,
    m,
    height,
    stride,
    row_stride,
    column_stride,
    own,
    signed,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """w_ij phi'(s_ij) by which scaled rows are multiplied, in both directions of a pair.

    One tile of a panel [height, stride], of which [n, m] are pairs and the rest is written as 0.
    `weights` may be `raw` itself. A tile of inactive rows and columns is written without being
    read. Reads and writes the panel once: bound by memory, or the second-level cache.
    """
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    p_i, q_i = _load_vector(row_pull, i, n), _load_vector(row_pull + row_stride, i, n)
    p_j, q_j = _load_vector(column_pull, j, m), _load_vector(column_pull + column_stride, j, m)
    active = tl.max(((p_i != 0) | (q_i != 0)).to(tl.int32), axis=0)
    active += tl.max(((p_j != 0) | (q_j != 0)).to(tl.int32), axis=0)
    w = tl.zeros((BLOCK_N, BLOCK_M), dtype=raw.dtype.element_ty)
    if active > 0:
        s = _scaled_panel(raw, row_rest, column_rest, i, j, n, m, stride)
        same = _load_vector(row_labels, i, n)[:, None] == _load_vector(column_labels, j, m)[None, :]
        pair = (i < n)[:, None] & (j < m)[None, :] & ((own == 0) | (i[:, None] != j[None, :]))
        w = tl.where(same, p_i[:, None] + p_j[None, :], q_i[:, None] + q_j[None, :])
        w = w * _phi_slope(s, signed)
        w = w * _load_vector(row_rest, i, n)[:, None] * _load_vector(column_rest, j, m)[None, :]
        w = tl.where(pair, w, 0.0)
    out = weights + i[:, None].to(tl.int64) * stride + j[None, :]
    tl.store(out, w, mask=(i < height)[:, None] & (j < stride)[None, :])
