"""Triton kernels over pairs of rows; `pairs` launches them. Importing this needs triton.

Index names follow the loss's formulas: i runs over rows, j over the columns they are compared with
(the rows themselves, `own`, or `ref_emb`), k over the embedding's dimension. A side, `rows` or
`columns`, is a `pairs.Side` written by `prepare_rows`: rows of one scale, padded with zeros to
whole blocks so that no operand is masked, and each row's class as a 32-bit number. Weights of a
side are a `pairs.Weights`.

Addresses of rows take 64 bits, offsets from them 32. Kernels are compiled once for a dtype and a
block shape: sizes are never specialised on, so a ragged batch that is cut into the same blocks
compiles nothing. A stride is written as a number of tiles times their size. The compiler then knows
a factor of the stride; without one it loads numbers one at a time.

Tensor cores cut the running sum of a product towards 0 every few steps, so the errors of a long sum
all have one sign and grow with its length. Where float32 must be exact (SPLIT), operands are sums
of two float16 numbers, each step of a product begins at zero with its smallest parts, and ordinary
additions join the steps.
"""

import triton
import triton.language as tl

from .formulas import inverse_norm, load_block, load_vector, operand, phi_of, slope_of


@triton.jit
def _share(count, parts, part):
    """[first, last) of `count` tiles for one of `parts` programs."""
    each = tl.cdiv(count, parts)
    return part * each, tl.minimum((part + 1) * each, count)


@triton.jit
def _bits_of_power(inverse):
    """(rest, power): `inverse` = rest power, where power is 2^k and 1/2 <= rest < 1."""
    bits = inverse.to(tl.int32, bitcast=True)
    power = ((((bits >> 23) & 255) + 1) << 23).to(tl.float32, bitcast=True)
    rest = ((bits & 0x007FFFFF) | (126 << 23)).to(tl.float32, bitcast=True)
    is_number = (inverse != 0) & (inverse == inverse)
    return tl.where(is_number, rest, inverse), tl.where(is_number, power, inverse)


@triton.jit
def _first_of_class(label, column_labels, i, n, m, BLOCK_M: tl.constexpr):
    """The first column with each row's label, m if there is none; stops once all are found."""
    first = tl.zeros_like(i) + m
    start = 0
    is_missing = 1
    while (is_missing != 0) & (start < m):
        j = start + tl.arange(0, BLOCK_M)
        same = (label[:, None] == load_vector(column_labels, j, m)[None, :]) & (j < m)[None, :]
        first = tl.minimum(first, tl.min(tl.where(same, j[None, :], m), axis=1))
        is_missing = tl.max(((first == m) & (i < n)).to(tl.int32), axis=0)
        start += BLOCK_M
    return first


@triton.jit(do_not_specialize=["n", "m"])
def prepare_rows(
    embeddings,
    labels,
    column_labels,
    side,
    n,
    m,
    d,
    width,
    stride_n,
    stride_d,
    squared_eps: tl.float64,
    SCALE: tl.constexpr,
    UNIT: tl.constexpr,
    SPLIT: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_N rows at one scale, and their classes among the columns: see `pairs.Side`.

    UNIT: f_i / n_i times SCALE, as high + low with SPLIT. Else f_i times the power of two next
    above 1 / n_i, which rounds only elements below 2^-14 n_i. Rows beyond n and elements beyond d
    are 0. Reads n d elements twice, from a cache the second time. COLUMNS: the rows are the
    columns, and the first row of each class counts its members. The search for that row and the
    count read labels, 8 bytes each.
    """
    acc: tl.constexpr = side.scales.dtype.element_ty
    element: tl.constexpr = side.high.dtype.element_ty
    rows = tl.num_programs(0) * BLOCK_N
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    label = load_vector(labels, i, n)
    first = _first_of_class(label, column_labels, i, n, m, BLOCK_M)
    tl.store(side.classes + i, tl.where(i < n, first, -1))
    if COLUMNS:
        is_first = (first == i) & (i < n)
        if tl.max(is_first.to(tl.int32), axis=0) > 0:
            count = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
            for start in range(0, m, BLOCK_M):
                j = start + tl.arange(0, BLOCK_M)
                same = label[:, None] == load_vector(column_labels, j, m)[None, :]
                count += (same & (j < m)[None, :]).to(tl.int32)
            tl.store(side.classes + rows + i, tl.sum(count, axis=1), mask=is_first)
    squared = tl.zeros((BLOCK_N, BLOCK_D), dtype=acc)
    for start in range(0, d, BLOCK_D):
        k = start + tl.arange(0, BLOCK_D)
        f = load_block(embeddings, i, k, n, d, stride_n, stride_d).to(acc)
        squared += f * f
    scale = inverse_norm(tl.sum(squared, axis=1), tl.full((), squared_eps, acc))
    if not UNIT:
        remaining, scale = _bits_of_power(scale)
        tl.store(side.scales + i, remaining)
    tl.store(side.scales + rows + i, scale)
    at = (i.to(tl.int64) * width)[:, None]
    for start in range(0, width, BLOCK_D):
        k = start + tl.arange(0, BLOCK_D)
        f = load_block(embeddings, i, k, n, d, stride_n, stride_d).to(acc)
        f = f * scale[:, None] * SCALE
        rounded = f.to(element)
        tl.store(side.high + at + k[None, :], rounded, mask=(k < width)[None, :])
        if SPLIT:
            rounded = (f - rounded.to(acc)).to(element)
            tl.store(side.low + at + k[None, :], rounded, mask=(k < width)[None, :])


@triton.jit
def _products(a, a_low, b, b_low, acc: tl.constexpr, SPLIT: tl.constexpr):
    """a b from zero; with SPLIT, (a + a_low) (b + b_low) without a_low b_low."""
    if SPLIT:
        total = tl.dot(a_low, b, out_dtype=acc)
        total = tl.dot(a, b_low, total, out_dtype=acc)
        total = tl.dot(a, b, total, out_dtype=acc)
    else:
        total = tl.dot(a, b, input_precision="ieee", out_dtype=acc)
    return total


@triton.jit
def _load_parts(matrix, at, k, SPLIT: tl.constexpr):
    """Blocks of `high` and `low` for rows that begin at `at`; without SPLIT `high` twice."""
    address = at[:, None] + k[None, :]
    a = operand(tl.load(matrix.high + address))
    a_low = a
    if SPLIT:
        a_low = tl.load(matrix.low + address)
    return a, a_low


@triton.jit
def _similarity(
    rows,
    columns,
    at_row,
    at_column,
    depth,
    acc: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Products of prepared rows and columns that begin at at_*, over `depth` of their elements."""
    total = tl.zeros((at_row.shape[0], at_column.shape[0]), dtype=acc)
    for start in range(0, depth, BLOCK_D):
        k = start + tl.arange(0, BLOCK_D)
        a, a_low = _load_parts(rows, at_row, k, SPLIT)
        b, b_low = _load_parts(columns, at_column, k, SPLIT)
        if SPLIT:
            total += _products(a, a_low, tl.trans(b), tl.trans(b_low), acc, SPLIT)
        else:
            total = tl.dot(a, tl.trans(b), total, input_precision="ieee", out_dtype=acc)
    return total


@triton.jit
def _phi_of_pairs(s, rows, columns, i, j, signed, OWN: tl.constexpr):
    """phi(s_ij) of pairs of one class, and of the others; a row is no pair with itself."""
    if OWN:
        s = tl.where(i[:, None] != j[None, :], s, 0.0)
    phi = phi_of(s, signed)
    same = tl.load(rows.classes + i)[:, None] == tl.load(columns.classes + j)[None, :]
    of_same = tl.where(same, phi, 0.0)
    return of_same, phi - of_same


@triton.jit(do_not_specialize=["column_tiles", "signed"])
def tile_sums(
    rows,
    columns,
    slots,
    width,
    column_tiles,
    signed,
    OWN: tl.constexpr,
    UNIT: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Sums of phi over P_i and over Q_i for BLOCK_N rows and a share of the columns.

    Program (r, p) walks the p-th share of the columns' tiles and writes slots[0, p, i] and
    slots[1, p, i]. WHOLE: BLOCK_D is the width, and rows are loaded once. Rows of scale c give c^4
    times the sums. 2 n m d FLOPs, times three with SPLIT. Bound by the products.
    """
    acc: tl.constexpr = slots.dtype.element_ty
    part = tl.program_id(1)
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_D)
    if not UNIT:
        rest_i = tl.load(rows.scales + i)[:, None]
    at_row = i.to(tl.int64) * width
    if WHOLE:
        a, a_low = _load_parts(rows, at_row, k, SPLIT)
    positive = tl.zeros((BLOCK_N,), dtype=acc)
    negative = tl.zeros((BLOCK_N,), dtype=acc)
    begin, end = _share(column_tiles, tl.num_programs(1), part)
    for c in range(begin, end):
        j = c * BLOCK_M + tl.arange(0, BLOCK_M)
        at_column = j.to(tl.int64) * width
        if WHOLE:
            b, b_low = _load_parts(columns, at_column, k, SPLIT)
            s = _products(a, a_low, tl.trans(b), tl.trans(b_low), acc, SPLIT)
        else:
            s = _similarity(rows, columns, at_row, at_column, width, acc, SPLIT, BLOCK_D)
        if not UNIT:
            s = s * rest_i * tl.load(columns.scales + j)[None, :]
        of_same, of_other = _phi_of_pairs(s, rows, columns, i, j, signed, OWN)
        positive += tl.sum(of_same, axis=1)
        negative += tl.sum(of_other, axis=1)
    plane = tl.num_programs(0).to(tl.int64) * BLOCK_N
    out = slots + part * plane + i
    tl.store(out, positive)
    tl.store(out + tl.num_programs(1) * plane, negative)


@triton.jit
def _tile(matrix, row, column, stride, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """Where a tile of a matrix begins, and its elements' offsets from there, in 32 bits."""
    begin = matrix + row.to(tl.int64) * stride + column
    return begin, tl.arange(0, BLOCK_N)[:, None] * stride + tl.arange(0, BLOCK_M)[None, :]


@triton.jit
def _triangle(p):
    """The p-th tile (row, column) on or below the diagonal."""
    row = ((tl.sqrt(8.0 * p.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > p, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= p, row + 1, row)
    return row, p - row * (row + 1) // 2


@triton.jit(do_not_specialize=["tiles"])
def half_tile_sums(
    side,
    slots,
    similarities,
    tiles,
    width,
    SIGNED: tl.constexpr,
    UNIT: tl.constexpr,
    SPLIT: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """As `tile_sums` where the rows are the columns, from half of S, a tile a program.

    The program of tile (r, c) writes its sums over columns to slots[0, c, i] and slots[1, c, i],
    and its sums over rows to slots[0, r, j] and slots[1, r, j]. KEPT: the tile is written too, for
    `tile_weights`. n^2 d FLOPs, times three with SPLIT. Bound by the products and by the bandwidth
    of the second-level cache.
    """
    acc: tl.constexpr = slots.dtype.element_ty
    r, c = _triangle(tl.program_id(0))
    rows = tiles * BLOCK_N
    i = r * BLOCK_N + tl.arange(0, BLOCK_N)
    j = c * BLOCK_N + tl.arange(0, BLOCK_N)
    at_row, at_column = i.to(tl.int64) * width, j.to(tl.int64) * width
    s = _similarity(side, side, at_row, at_column, width, acc, SPLIT, BLOCK_D)
    if not UNIT:
        s = s * tl.load(side.scales + i)[:, None] * tl.load(side.scales + j)[None, :]
    if KEPT:
        tile, at = _tile(similarities, r * BLOCK_N, c * BLOCK_N, rows, BLOCK_N, BLOCK_N)
        tl.store(tile + at, s.to(similarities.dtype.element_ty))
    of_same, of_other = _phi_of_pairs(s, side, side, i, j, SIGNED, True)
    plane = tiles.to(tl.int64) * rows
    out = slots + c * rows + i
    tl.store(out, tl.sum(of_same, axis=1))
    tl.store(out + plane, tl.sum(of_other, axis=1))
    is_other = (r != c) & (j >= 0)
    out = slots + r * rows + j
    tl.store(out, tl.sum(of_same, axis=0), mask=is_other)
    tl.store(out + plane, tl.sum(of_other, axis=0), mask=is_other)


@triton.jit
def _add_slots(slots, rows, i, parts, BLOCK_T: tl.constexpr):
    """The sum over t < parts of slots[t, i], in a fixed order."""
    total = tl.zeros((BLOCK_T, i.shape[0]), dtype=slots.dtype.element_ty)
    for start in range(0, parts, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        at = (t.to(tl.int64) * rows)[:, None] + i[None, :]
        total += tl.load(slots + at, mask=(t < parts)[:, None], other=0.0)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["n", "m", "column_rows", "parts", "own", "mean"])
def finish_rows(
    slots,
    side,
    columns,
    row_loss,
    positive,
    negative,
    pull,
    n,
    m,
    column_rows,
    parts,
    own,
    mean,
    margin: tl.float64,
    sigma,
    PHI_SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Eq. 3's means and the hinge of BLOCK_N rows, from slots [2, parts, rows] of their sums.

    pull[0, i] and pull[1, i] are the weights of row i's positives and negatives in dL/dS for an
    upstream of 1: -1/N_i+ and sigma/N_i-, over N for the mean, 0 if h_i <= 0 and beyond n.
    column_rows: the padded number of columns, where class sizes begin in `columns.classes`. Bound
    by memory.
    """
    acc: tl.constexpr = slots.dtype.element_ty
    scale = tl.where(mean != 0, 1.0 / n.to(acc), 1.0)
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.num_programs(0).to(tl.int64) * BLOCK_N
    of_same = _add_slots(slots, rows, i, parts, BLOCK_T)
    of_other = _add_slots(slots + parts * rows, rows, i, parts, BLOCK_T)
    inside = i < n
    of_class = tl.load(side.classes + i)
    count = columns.classes + column_rows + of_class
    n_positive = tl.load(count, mask=inside & (of_class < m), other=own) - own
    n_negative = tl.maximum(m - own - n_positive, 1).to(acc)
    n_positive = tl.maximum(n_positive, 1).to(acc)
    positive_mean = of_same * PHI_SCALE / n_positive
    negative_mean = of_other * PHI_SCALE / n_negative
    h = tl.full((), margin, acc) - positive_mean + sigma * negative_mean
    inactive = (h <= 0) | (i >= n)
    tl.store(row_loss + i, tl.where(inactive, 0.0, h), mask=inside)
    tl.store(positive + i, positive_mean, mask=inside)
    tl.store(negative + i, negative_mean, mask=inside)
    tl.store(pull + i, tl.where(inactive, 0.0, -scale / n_positive))
    tl.store(pull + rows + i, tl.where(inactive, 0.0, sigma * scale / n_negative))


@triton.jit
def _store_scale(scale, largest, LARGEST: tl.constexpr):
    """Store the power of two that brings max(largest) between 2^(LARGEST - 1) and 2^LARGEST."""
    bits = tl.max(largest[None, :], axis=1).to(tl.float32).to(tl.int32, bitcast=True)
    exponent = tl.minimum(tl.maximum((bits >> 23) - 126, -90), 120)  # so that power is normal
    power = ((LARGEST - exponent + 127) << 23).to(tl.float32, bitcast=True)
    tl.store(scale + tl.arange(0, 1), power.to(largest.dtype))


@triton.jit(do_not_specialize=["n", "n_rows", "mean"])
def reduce_losses(
    row_loss,
    pull,
    loss,
    scale,
    n,
    n_rows,
    mean,
    LARGEST: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The sum of all rows' losses, or their mean, and the scale of weights in half precision.

    One program, so that the sum has one order. Reads 3 n numbers. Bound by latency.
    """
    acc: tl.constexpr = row_loss.dtype.element_ty
    total = tl.zeros((BLOCK_N,), dtype=acc)
    largest = tl.zeros((BLOCK_N,), dtype=acc)
    for start in range(0, n, BLOCK_N):
        i = start + tl.arange(0, BLOCK_N)
        total += load_vector(row_loss, i, n)
        largest = tl.maximum(largest, tl.abs(load_vector(pull, i, n)))
        largest = tl.maximum(largest, tl.abs(load_vector(pull + n_rows.to(tl.int64), i, n)))
    # summed as a row of a matrix: Triton 3.6 cannot lay out the sum of a vector on Blackwell
    total = tl.sum(total[None, :], axis=1) * tl.where(mean != 0, 1.0 / n.to(acc), 1.0)
    tl.store(loss + tl.arange(0, 1), total)
    _store_scale(scale, largest, LARGEST)


@triton.jit(do_not_specialize=["n", "n_rows", "upstream_stride"])
def weigh_rows(
    pull,
    upstream,
    weight,
    scale,
    n,
    n_rows,
    upstream_stride,
    LARGEST: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Pulls times each row's upstream, exactly 0 where the pulls are, and the scale.

    pull, weight: [2, n_rows]. One program, because of the maximum. Bound by latency.
    """
    acc: tl.constexpr = pull.dtype.element_ty
    largest = tl.zeros((BLOCK_N,), dtype=acc)
    for start in range(0, n_rows, BLOCK_N):
        i = start + tl.arange(0, BLOCK_N)
        p, q = load_vector(pull, i, n), load_vector(pull + n_rows.to(tl.int64), i, n)
        address = upstream + i.to(tl.int64) * upstream_stride
        g = tl.load(address, mask=(p != 0) | (q != 0), other=0)
        tl.store(weight + i, p * g, mask=i < n_rows)
        tl.store(weight + n_rows.to(tl.int64) + i, q * g, mask=i < n_rows)
        largest = tl.maximum(largest, tl.maximum(tl.abs(p * g), tl.abs(q * g)))
    _store_scale(scale, largest, LARGEST)


@triton.jit
def _load_weights(weights, i, count):
    """Scaled weights of rows i, for positives and for negatives; count: rows of the side."""
    scale = tl.load(weights.scale)
    p = tl.load(weights.of_rows + i)
    return p * scale, tl.load(weights.of_rows + count.to(tl.int64) + i) * scale


@triton.jit
def _pair_weights(
    s,
    rows,
    columns,
    of_row,
    of_column,
    i,
    j,
    signed,
    OWN: tl.constexpr,
    UNIT: tl.constexpr,
    KEPT: tl.constexpr,
):
    """w_ij phi'(s_ij) rest_i rest_j from products of prepared rows; w_ij has both rows' losses.

    of_row, of_column: what `_load_weights` returned. UNIT, at a scale of c: c^2 w_ij phi'(s_ij).
    KEPT: s is that of unit rows, though prepared rows are not UNIT.
    """
    p_i, q_i = of_row
    p_j, q_j = of_column
    same = tl.load(rows.classes + i)[:, None] == tl.load(columns.classes + j)[None, :]
    w = tl.where(same, p_i[:, None] + p_j[None, :], q_i[:, None] + q_j[None, :])
    if UNIT:
        w = w * slope_of(s, signed)
    else:
        rest = tl.load(rows.scales + i)[:, None] * tl.load(columns.scales + j)[None, :]
        if not KEPT:
            s = s * rest
        w = w * slope_of(s, signed) * rest
    if OWN:
        w = tl.where(i[:, None] != j[None, :], w, 0.0)
    return w


@triton.jit
def _in_parts(w, element: tl.constexpr, acc: tl.constexpr, SPLIT: tl.constexpr):
    """w as `element`, and with SPLIT what the rounding left."""
    rounded = w.to(element)
    left = rounded
    if SPLIT:
        left = (w - rounded.to(acc)).to(element)
    return rounded, left


@triton.jit(do_not_specialize=["column_tiles", "signed"])
def tile_gradient(
    rows,
    row_weights,
    columns,
    column_weights,
    partial,
    width,
    column_tiles,
    signed,
    OWN: tl.constexpr,
    UNIT: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """BLOCK_V columns of v_i = sum of w_ij phi'(s_ij) f^_j for BLOCK_N rows and a share of the j.

    Program (r, c, p) forms tiles of S (2 d FLOPs a pair) and multiplies their weights with f_j (2
    BLOCK_V a pair), all times three with SPLIT; writes partial[p, i, k]. WHOLE: BLOCK_D and BLOCK_V
    are the width, and one load of f_j serves both products. `normalise_gradient` adds up the
    parts. Bound by the products.
    """
    acc: tl.constexpr = partial.dtype.element_ty
    element: tl.constexpr = rows.high.dtype.element_ty
    part = tl.program_id(2)
    n_rows, n_columns = tl.num_programs(0) * BLOCK_N, column_tiles * BLOCK_M
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    of_row = _load_weights(row_weights, i, n_rows)
    at_row = i.to(tl.int64) * width
    if WHOLE:
        a, a_low = _load_parts(rows, at_row, k, SPLIT)
    v = tl.zeros((BLOCK_N, BLOCK_V), dtype=acc)
    begin, end = _share(column_tiles, tl.num_programs(2), part)
    for tile in range(begin, end):
        j = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        at_column = j.to(tl.int64) * width
        if WHOLE:
            b, b_low = _load_parts(columns, at_column, k, SPLIT)
            s = _products(a, a_low, tl.trans(b), tl.trans(b_low), acc, SPLIT)
        else:
            s = _similarity(rows, columns, at_row, at_column, width, acc, SPLIT, BLOCK_D)
            b, b_low = _load_parts(columns, at_column, k, SPLIT)
        of_column = _load_weights(column_weights, j, n_columns)
        w = _pair_weights(s, rows, columns, of_row, of_column, i, j, signed, OWN, UNIT, False)
        w, w_low = _in_parts(w, element, acc, SPLIT)
        if SPLIT:
            v += _products(w, w_low, b, b_low, acc, SPLIT)
        else:
            v = tl.dot(operand(w), b, v, input_precision="ieee", out_dtype=acc)
    out = partial + ((part.to(tl.int64) * n_rows + i) * width)[:, None] + k[None, :]
    tl.store(out, v)


@triton.jit(do_not_specialize=["row_tiles", "first", "column_tiles", "signed"])
def tile_weights(
    rows,
    row_weights,
    columns,
    column_weights,
    similarities,
    panel,
    width,
    first,
    row_tiles,
    column_tiles,
    signed,
    OWN: tl.constexpr,
    MIRRORED: tl.constexpr,
    KEPT: tl.constexpr,
    UNIT: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of weights (`_pair_weights`) of a panel of rows from `first` on.

    MIRRORED: the panel is all of a symmetric S, and a tile below the diagonal is written on both
    its sides. A tile of inactive rows and columns is 0, and nothing is multiplied. 2 width FLOPs a
    pair, times three with SPLIT; writes 2 bytes a pair, 4 with SPLIT, 8 in float64. Bound by the
    products. KEPT: S is read as `half_tile_sums` wrote it, 1 byte a pair; bound by memory.
    """
    acc: tl.constexpr = row_weights.of_rows.dtype.element_ty
    element: tl.constexpr = panel.high.dtype.element_ty
    p = tl.program_id(0)
    n_columns = column_tiles * BLOCK_M
    if MIRRORED:  # blocks are square
        r, c = _triangle(p)
    else:
        r, c = p // column_tiles, p % column_tiles
    i = first + r * BLOCK_N + tl.arange(0, BLOCK_N)
    j = c * BLOCK_M + tl.arange(0, BLOCK_M)
    of_row = _load_weights(row_weights, i, row_tiles * BLOCK_N)
    of_column = _load_weights(column_weights, j, n_columns)
    active = tl.max(((of_row[0] != 0) | (of_row[1] != 0)).to(tl.int32), axis=0)
    active += tl.max(((of_column[0] != 0) | (of_column[1] != 0)).to(tl.int32), axis=0)
    if KEPT:
        tile, at = _tile(similarities, r * BLOCK_N, c * BLOCK_M, n_columns, BLOCK_N, BLOCK_M)
        s = tl.load(tile + at, mask=(at >= 0) & (active > 0), other=0.0).to(acc)
    else:
        depth = tl.where(active > 0, width, 0)
        at_row, at_column = i.to(tl.int64) * width, j.to(tl.int64) * width
        s = _similarity(rows, columns, at_row, at_column, depth, acc, SPLIT, BLOCK_D)
    w = _pair_weights(s, rows, columns, of_row, of_column, i, j, signed, OWN, UNIT, KEPT)
    w, w_low = _in_parts(w, element, acc, SPLIT)
    tile, at = _tile(panel.high, r * BLOCK_N, c * BLOCK_M, n_columns, BLOCK_N, BLOCK_M)
    tl.store(tile + at, w)
    if SPLIT:
        tile, at = _tile(panel.low, r * BLOCK_N, c * BLOCK_M, n_columns, BLOCK_N, BLOCK_M)
        tl.store(tile + at, w_low)
    if MIRRORED:  # noqa: SIM102 - this is known when compiling, the rest is not
        if r != c:
            tile, at = _tile(panel.high, c * BLOCK_M, r * BLOCK_N, n_columns, BLOCK_M, BLOCK_N)
            tl.store(tile + at, tl.trans(w))
            if SPLIT:
                tile, at = _tile(panel.low, c * BLOCK_M, r * BLOCK_N, n_columns, BLOCK_M, BLOCK_N)
                tl.store(tile + at, tl.trans(w_low))


@triton.jit(do_not_specialize=["n_rows", "column_tiles", "first"])
def weighted_rows(
    panel,
    columns,
    partial,
    n_rows,
    column_tiles,
    width,
    first,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """partial[p, first + i, k] = the sum of weights[i, j] f_j[k] over the p-th share of the j.

    torch's product would instead keep one running sum over all j in a tensor core. 2 d FLOPs a
    pair, times three with SPLIT. Bound by the products.
    """
    acc: tl.constexpr = partial.dtype.element_ty
    local = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    part = tl.program_id(2)
    at_row = local.to(tl.int64) * (column_tiles * BLOCK_M)
    total = tl.zeros((BLOCK_N, BLOCK_V), dtype=acc)
    begin, end = _share(column_tiles, tl.num_programs(2), part)
    for tile in range(begin, end):
        j = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        w, w_low = _load_parts(panel, at_row, j, SPLIT)
        f, f_low = _load_parts(columns, j.to(tl.int64) * width, k, SPLIT)
        total += _products(w, w_low, f, f_low, acc, SPLIT)
    out = partial + ((part.to(tl.int64) * n_rows + first + local) * width)[:, None] + k[None, :]
    tl.store(out, total)


@triton.jit
def _direction(partial, side, at, k, inside, plane, parts, acc: tl.constexpr, SPLIT: tl.constexpr):
    """v_i, its parts added in order, and the prepared row."""
    u = tl.load(side.high + at + k, mask=inside, other=0.0).to(acc)
    if SPLIT:
        u += tl.load(side.low + at + k, mask=inside, other=0.0).to(acc)
    v = tl.load(partial + at + k, mask=inside, other=0.0)
    for part in range(1, parts):
        v += tl.load(partial + part * plane + at + k, mask=inside, other=0.0)
    return v, u


@triton.jit(do_not_specialize=["n", "n_rows", "parts", "one_upstream"])
def normalise_gradient(
    partial,
    side,
    scale,
    upstream,
    gradient,
    n,
    d,
    width,
    n_rows,
    parts,
    one_upstream,
    SCALE: tl.constexpr,
    UNIT: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dL/df_i = (v_i - (v_i . f^_i) f^_i) / n_i of BLOCK_N rows: the normalisation's backward.

    partial[p, i, k] adds up to v_i times SCALE^3 `scale`, and times rest_i where rows are not UNIT.
    one_upstream: the upstream is one number for all rows, and is multiplied in here. Reads partial
    and the rows twice, from a cache the second time; writes n d numbers. Bound by memory.
    """
    acc: tl.constexpr = partial.dtype.element_ty
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = (i.to(tl.int64) * width)[:, None]
    plane = n_rows.to(tl.int64) * width
    power = tl.load(side.scales + n_rows + i)
    factor = (power / tl.load(scale) / (SCALE * SCALE * SCALE))[:, None]
    factor = factor * tl.where(one_upstream != 0, tl.load(upstream), 1.0)
    to_unit = tl.full((BLOCK_N, 1), 1.0 / SCALE, acc)
    if not UNIT:
        to_unit = tl.load(side.scales + i)[:, None]
    along = tl.zeros((BLOCK_N, BLOCK_D), dtype=acc)
    for start in range(0, width, BLOCK_D):
        k = start + tl.arange(0, BLOCK_D)[None, :]
        v, u = _direction(partial, side, at, k, k < width, plane, parts, acc, SPLIT)
        along += v * (u * to_unit)
    along = tl.sum(along, axis=1)[:, None]
    to = (i.to(tl.int64) * d)[:, None]
    for start in range(0, width, BLOCK_D):
        k = start + tl.arange(0, BLOCK_D)[None, :]
        v, u = _direction(partial, side, at, k, k < width, plane, parts, acc, SPLIT)
        v = v - along * (u * to_unit)
        v = tl.where(v == 0, 0.0, v * factor)  # inactive rows, whatever the upstream
        tl.store(gradient + to + k, v, mask=(i < n)[:, None] & (k < d))
