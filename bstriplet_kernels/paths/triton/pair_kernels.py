"""Triton kernels of impl="triton"; `fused` and `pairs` launch them. Importing this needs triton.

Index names follow DESIGN: i runs over rows, j over the columns they are compared with (the rows
themselves, `own`, or `ref_emb`), k over the embedding's dimension. Every address is formed in 64
bits. Kernels are compiled once for a dtype and a block shape: n and m are never specialised on, so
a ragged batch compiles nothing.

`loss_and_gradient` takes a small batch as it is stored. All other kernels take what `prepare_rows`
made of it: rows of one scale, padded with zeros to whole blocks, so that no operand is masked; and
each row's class as a 32-bit number, that of the first column with its label.

Tensor cores cut the running sum of a product towards 0 after each few steps. The errors of a long
sum all have one sign, and grow with its length. Where float32 is to be exact (SPLIT), operands are
sums of two float16 numbers, a step of a product begins at zero with its smallest parts, and
ordinary additions put steps together.
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
def _share(count, parts, part):
    """[first, last) of `count` tiles for one of `parts` programs."""
    each = tl.cdiv(count, parts)
    return part * each, tl.minimum((part + 1) * each, count)


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
    elements, 4 products of 2 n^2 BLOCK_D FLOPs. Bound by latency: hence one step each.
    """
    acc: tl.constexpr = partial.dtype.element_ty
    i = tl.arange(0, BLOCK_N)
    k = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    f = _load_block(embeddings, i, k, n, d, stride_n, stride_d)
    high = f.to(tl.bfloat16)
    middle = (f - high.to(acc)).to(tl.bfloat16)
    low = _operand((f - high.to(acc) - middle.to(acc)).to(tl.bfloat16))
    high, middle = _operand(high), _operand(middle)
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

    SUMMED: products come in `parts` from `batch_products`, since the step of an exact float32
    product takes 3 us on an H200, six times a half-precision one, and each of these programs would
    take all of them one after another.
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
            f = _operand(_load_block(embeddings, i, k, n, d, stride_n, stride_d))
            raw = tl.dot(f, tl.trans(f), raw, input_precision=PRECISION, out_dtype=acc)

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
        w = w * inverse[None, :]
        along = tl.sum(w * raw, axis=1) * inverse * inverse  # of these very weights
        w = tl.where(off_diagonal, w, -along[:, None])
        k = part * BLOCK_V + tl.arange(0, BLOCK_V)
        f = _load_block(embeddings, i, k, n, d, stride_n, stride_d).to(acc)
        v = tl.dot(w, f, input_precision=PRECISION, out_dtype=acc) * inverse[:, None]
        out = gradient + i[:, None].to(tl.int64) * d + k[None, :]
        tl.store(out, v, mask=(i < n)[:, None] & (k < d)[None, :])


@triton.jit
def _bits_of_power(inverse):
    """(rest, power): their product is `inverse`, power is one of two and 1/2 <= rest < 1."""
    if inverse.dtype == tl.float64:
        bits = inverse.to(tl.int64, bitcast=True)
        power = ((((bits >> 52) & 2047) + 1) << 52).to(tl.float64, bitcast=True)
        rest = ((bits & 0x000FFFFFFFFFFFFF) | (1022 << 52)).to(tl.float64, bitcast=True)
    else:
        bits = inverse.to(tl.int32, bitcast=True)
        power = ((((bits >> 23) & 255) + 1) << 23).to(tl.float32, bitcast=True)
        rest = ((bits & 0x007FFFFF) | (126 << 23)).to(tl.float32, bitcast=True)
    is_number = (inverse != 0) & (inverse == inverse)
    return tl.where(is_number, rest, inverse), tl.where(is_number, power, inverse)


@triton.jit
def _first_of_class(label, column_labels, i, n, m, BLOCK_M: tl.constexpr):
    """The first column with the label of each row, m where there is none; looks no further."""
    first = tl.zeros_like(i) + m
    start = 0
    is_missing = 1
    while (is_missing != 0) & (start < m):
        j = start + tl.arange(0, BLOCK_M)
        same = (label[:, None] == _load_vector(column_labels, j, m)[None, :]) & (j < m)[None, :]
        first = tl.minimum(first, tl.min(tl.where(same, j[None, :], m), axis=1))
        is_missing = tl.max(((first == m) & (i < n)).to(tl.int32), axis=0)
        start += BLOCK_M
    return first


@triton.jit(do_not_specialize=["n", "m"])
def prepare_rows(
    embeddings,
    labels,
    column_labels,
    high,
    low,
    rest,
    power,
    classes,
    counts,
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

    UNIT: f_i / n_i times SCALE, as high + low with SPLIT. Else f_i times the power of two next to
    1 / n_i, which rounds nothing. Beyond n rows are 0, and so are elements beyond d. Reads n d
    elements twice, from a cache the second time. COLUMNS: the rows are the columns, and the first
    of each class counts its members; that and the search for it read labels, 8 bytes each.
    """
    acc: tl.constexpr = power.dtype.element_ty
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    label = _load_vector(labels, i, n)
    first = _first_of_class(label, column_labels, i, n, m, BLOCK_M)
    tl.store(classes + i, tl.where(i < n, first, -1))
    if COLUMNS:
        is_first = (first == i) & (i < n)
        if tl.max(is_first.to(tl.int32), axis=0) > 0:
            count = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
            for start in range(0, m, BLOCK_M):
                j = start + tl.arange(0, BLOCK_M)
                same = label[:, None] == _load_vector(column_labels, j, m)[None, :]
                count += (same & (j < m)[None, :]).to(tl.int32)
            tl.store(counts + i, tl.sum(count, axis=1), mask=is_first)
    squared = tl.zeros((BLOCK_N, BLOCK_D), dtype=acc)
    for start in range(0, d, BLOCK_D):
        k = start + tl.arange(0, BLOCK_D)
        f = _load_block(embeddings, i, k, n, d, stride_n, stride_d).to(acc)
        squared += f * f
    scale = _inverse_norm(tl.sum(squared, axis=1), tl.full((), squared_eps, acc))
    if not UNIT:
        remaining, scale = _bits_of_power(scale)
        tl.store(rest + i, remaining)
    tl.store(power + i, scale)
    at = (i.to(tl.int64) * width)[:, None]
    for start in range(0, width, BLOCK_D):
        k = start + tl.arange(0, BLOCK_D)
        f = _load_block(embeddings, i, k, n, d, stride_n, stride_d).to(acc)
        f = f * scale[:, None] * SCALE
        rounded = f.to(high.dtype.element_ty)
        tl.store(high + at + k[None, :], rounded, mask=(k < width)[None, :])
        if SPLIT:
            rounded = (f - rounded.to(acc)).to(high.dtype.element_ty)
            tl.store(low + at + k[None, :], rounded, mask=(k < width)[None, :])


@triton.jit
def _products(a, a_low, b, b_low, acc: tl.constexpr, SPLIT: tl.constexpr):
    """a b from zero; split: of a + a_low and b + b_low, but for a_low b_low."""
    if SPLIT:
        total = tl.dot(a_low, b, out_dtype=acc)
        total = tl.dot(a, b_low, total, out_dtype=acc)
        total = tl.dot(a, b, total, out_dtype=acc)
    else:
        total = tl.dot(a, b, input_precision="ieee", out_dtype=acc)
    return total


@triton.jit
def _load_rows(high, low, at, k, SPLIT: tl.constexpr):
    """A block of prepared rows that begin at `at`, and of what their rounding left."""
    address = at[:, None] + k[None, :]
    a = _operand(tl.load(high + address))
    a_low = a
    if SPLIT:
        a_low = tl.load(low + address)
    return a, a_low


@triton.jit
def _similarity(
    row_high,
    row_low,
    column_high,
    column_low,
    at_row,
    at_column,
    depth,
    acc: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Products of prepared rows and columns that begin there, over `depth` of their elements."""
    total = tl.zeros((at_row.shape[0], at_column.shape[0]), dtype=acc)
    for start in range(0, depth, BLOCK_D):
        k = start + tl.arange(0, BLOCK_D)
        a, a_low = _load_rows(row_high, row_low, at_row, k, SPLIT)
        b, b_low = _load_rows(column_high, column_low, at_column, k, SPLIT)
        if SPLIT:
            total += _products(a, a_low, tl.trans(b), tl.trans(b_low), acc, SPLIT)
        else:
            total = tl.dot(a, tl.trans(b), total, input_precision="ieee", out_dtype=acc)
    return total


@triton.jit
def _phi_of_pairs(s, row_classes, column_classes, i, j, signed, OWN: tl.constexpr):
    """phi(s_ij) of pairs of one class, and of the others; a row is no pair with itself."""
    if OWN:
        s = tl.where(i[:, None] != j[None, :], s, 0.0)
    phi = _phi(s, signed)
    same = tl.load(row_classes + i)[:, None] == tl.load(column_classes + j)[None, :]
    of_same = tl.where(same, phi, 0.0)
    return of_same, phi - of_same


@triton.jit(do_not_specialize=["column_tiles", "signed"])
def tile_sums(
    row_high,
    row_low,
    column_high,
    column_low,
    row_rest,
    column_rest,
    row_classes,
    column_classes,
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
    slots[1, p, i]. WHOLE: BLOCK_D is the width, and rows are loaded once. At a scale of c sums are
    c^4 times what they stand for. 2 n m d FLOPs, times three with SPLIT. Bound by the products.
    """
    acc: tl.constexpr = slots.dtype.element_ty
    part = tl.program_id(1)
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_D)
    if not UNIT:
        rest_i = tl.load(row_rest + i)[:, None]
    at_row = i.to(tl.int64) * width
    if WHOLE:
        a, a_low = _load_rows(row_high, row_low, at_row, k, SPLIT)
    positive = tl.zeros((BLOCK_N,), dtype=acc)
    negative = tl.zeros((BLOCK_N,), dtype=acc)
    begin, end = _share(column_tiles, tl.num_programs(1), part)
    for c in range(begin, end):
        j = c * BLOCK_M + tl.arange(0, BLOCK_M)
        at_column = j.to(tl.int64) * width
        if WHOLE:
            b, b_low = _load_rows(column_high, column_low, at_column, k, SPLIT)
            s = _products(a, a_low, tl.trans(b), tl.trans(b_low), acc, SPLIT)
        else:
            s = _similarity(
                row_high,
                row_low,
                column_high,
                column_low,
                at_row,
                at_column,
                width,
                acc,
                SPLIT,
                BLOCK_D,
            )
        if not UNIT:
            s = s * rest_i * tl.load(column_rest + j)[None, :]
        of_same, of_other = _phi_of_pairs(s, row_classes, column_classes, i, j, signed, OWN)
        positive += tl.sum(of_same, axis=1)
        negative += tl.sum(of_other, axis=1)
    rows = tl.num_programs(0).to(tl.int64) * BLOCK_N
    out = slots + part * rows + i
    tl.store(out, positive)
    tl.store(out + tl.num_programs(1) * rows, negative)


@triton.jit
def _tile(matrix, row, column, stride, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """Where a tile of a matrix begins, and its elements from there, in 32 bits."""
    begin = matrix + row.to(tl.int64) * stride + column
    return begin, tl.arange(0, BLOCK_N)[:, None] * stride + tl.arange(0, BLOCK_M)[None, :]


@triton.jit
def _triangle(p):
    """The p-th tile (row, column) up to the diagonal."""
    row = ((tl.sqrt(8.0 * p.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > p, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= p, row + 1, row)
    return row, p - row * (row + 1) // 2


@triton.jit(do_not_specialize=["tiles"])
def half_tile_sums(
    row_high,
    row_low,
    row_rest,
    row_classes,
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
    """As `tile_sums` where the rows are the columns: of half of S, a tile a program.

    The tile of rows r and columns c gives its sums over columns to rows, slots[0, c, i] and
    slots[1, c, i], and its sums over rows to columns, slots[0, r, j] and slots[1, r, j]. KEPT: the
    tile is written too, for `tile_weights`. n^2 d FLOPs, times three with SPLIT. Bound by the
    products, and by what the second-level cache delivers.
    """
    acc: tl.constexpr = slots.dtype.element_ty
    r, c = _triangle(tl.program_id(0))
    rows = tiles * BLOCK_N
    i = r * BLOCK_N + tl.arange(0, BLOCK_N)
    j = c * BLOCK_N + tl.arange(0, BLOCK_N)
    at_row, at_column = i.to(tl.int64) * width, j.to(tl.int64) * width
    s = _similarity(
        row_high, row_low, row_high, row_low, at_row, at_column, width, acc, SPLIT, BLOCK_D
    )
    if not UNIT:
        s = s * tl.load(row_rest + i)[:, None] * tl.load(row_rest + j)[None, :]
    if KEPT:
        tile, at = _tile(similarities, r * BLOCK_N, c * BLOCK_N, rows, BLOCK_N, BLOCK_N)
        tl.store(tile + at, s.to(similarities.dtype.element_ty))
    of_same, of_other = _phi_of_pairs(s, row_classes, row_classes, i, j, SIGNED, True)
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


@triton.jit(do_not_specialize=["n", "m", "parts", "own", "mean"])
def finish_rows(
    slots,
    classes,
    column_counts,
    row_loss,
    positive,
    negative,
    pull,
    n,
    m,
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

    pull[0, i] and pull[1, i] are what row i's pairs weigh in dL/dS for dL/dl_i = 1: -1/N_i+ and
    sigma/N_i-, over N for the mean, 0 where h_i <= 0 and beyond n. Bound by memory.
    """
    acc: tl.constexpr = slots.dtype.element_ty
    scale = tl.where(mean != 0, 1.0 / n.to(acc), 1.0)
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.num_programs(0).to(tl.int64) * BLOCK_N
    of_same = _add_slots(slots, rows, i, parts, BLOCK_T)
    of_other = _add_slots(slots + parts * rows, rows, i, parts, BLOCK_T)
    inside = i < n
    of_class = tl.load(classes + i)
    n_positive = tl.load(column_counts + of_class, mask=inside & (of_class < m), other=own) - own
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
    """The power of two that has max(largest) between 2^(LARGEST - 1) and 2^LARGEST."""
    bits = tl.max(largest[None, :], axis=1).to(tl.float32).to(tl.int32, bitcast=True)
    exponent = tl.minimum(tl.maximum((bits >> 23) - 126, -90), 120)  # so that it is normal
    power = ((LARGEST - exponent + 127) << 23).to(tl.float32, bitcast=True)
    tl.store(scale + tl.arange(0, 1), power.to(largest.dtype))


@triton.jit(do_not_specialize=["n", "rows", "mean"])
def reduce_losses(
    row_loss,
    pull,
    loss,
    scale,
    n,
    rows,
    mean,
    LARGEST: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The sum of all rows' losses, or their mean, and the scale of weights in half precision.

    By one program: one order of the sum. Reads 3 n numbers. Bound by latency.
    """
    acc: tl.constexpr = row_loss.dtype.element_ty
    total = tl.zeros((BLOCK_N,), dtype=acc)
    largest = tl.zeros((BLOCK_N,), dtype=acc)
    for start in range(0, n, BLOCK_N):
        i = start + tl.arange(0, BLOCK_N)
        total += _load_vector(row_loss, i, n)
        largest = tl.maximum(largest, tl.abs(_load_vector(pull, i, n)))
        largest = tl.maximum(largest, tl.abs(_load_vector(pull + rows.to(tl.int64), i, n)))
    # summed as a row of a matrix: Triton 3.6 cannot lay out the sum of a vector on Blackwell
    total = tl.sum(total[None, :], axis=1) * tl.where(mean != 0, 1.0 / n.to(acc), 1.0)
    tl.store(loss + tl.arange(0, 1), total)
    _store_scale(scale, largest, LARGEST)


@triton.jit(do_not_specialize=["n", "rows", "upstream_stride"])
def weigh_rows(
    pull,
    upstream,
    weight,
    scale,
    n,
    rows,
    upstream_stride,
    LARGEST: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Pulls times what comes from upstream for each row, exactly 0 where they are, and the scale.

    pull, weight: [2, rows]. By one program, because of the maximum. Bound by latency.
    """
    acc: tl.constexpr = pull.dtype.element_ty
    largest = tl.zeros((BLOCK_N,), dtype=acc)
    for start in range(0, rows, BLOCK_N):
        i = start + tl.arange(0, BLOCK_N)
        p, q = _load_vector(pull, i, n), _load_vector(pull + rows.to(tl.int64), i, n)
        address = upstream + i.to(tl.int64) * upstream_stride
        g = tl.load(address, mask=(p != 0) | (q != 0), other=0)
        tl.store(weight + i, p * g, mask=i < rows)
        tl.store(weight + rows.to(tl.int64) + i, q * g, mask=i < rows)
        largest = tl.maximum(largest, tl.maximum(tl.abs(p * g), tl.abs(q * g)))
    _store_scale(scale, largest, LARGEST)


@triton.jit
def _load_weights(weight, factor, i, rows):
    """What row i weighs on its positives and on its negatives, times a factor."""
    return tl.load(weight + i) * factor, tl.load(weight + rows.to(tl.int64) + i) * factor


@triton.jit
def _pair_weights(
    s,
    rest_i,
    class_i,
    p_i,
    q_i,
    p_j,
    q_j,
    column_rest,
    column_classes,
    i,
    j,
    signed,
    OWN: tl.constexpr,
    UNIT: tl.constexpr,
    KEPT: tl.constexpr = False,
):
    """w_ij phi'(s_ij) rest_i rest_j from products of prepared rows, in both directions of a pair.

    UNIT, at a scale of c: c^2 w_ij phi'(s_ij). KEPT: s is of unit rows, and of others than UNIT.
    """
    same = class_i[:, None] == tl.load(column_classes + j)[None, :]
    w = tl.where(same, p_i[:, None] + p_j[None, :], q_i[:, None] + q_j[None, :])
    if UNIT:
        w = w * _phi_slope(s, signed)
    else:
        rest = rest_i[:, None] * tl.load(column_rest + j)[None, :]
        if not KEPT:
            s = s * rest
        w = w * _phi_slope(s, signed) * rest
    if OWN:
        w = tl.where(i[:, None] != j[None, :], w, 0.0)
    return w


@triton.jit
def _split(w, element: tl.constexpr, acc: tl.constexpr, SPLIT: tl.constexpr):
    """w as `element`, and with SPLIT what the rounding left."""
    rounded = w.to(element)
    left = rounded
    if SPLIT:
        left = (w - rounded.to(acc)).to(element)
    return rounded, left


@triton.jit(do_not_specialize=["column_tiles", "signed"])
def tile_gradient(
    row_high,
    row_low,
    column_high,
    column_low,
    row_rest,
    column_rest,
    row_classes,
    column_classes,
    row_weight,
    column_weight,
    scale,
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
    are the width, and what is loaded of f_j serves both products. `normalise_gradient` adds up the
    parts. Bound by the products.
    """
    acc: tl.constexpr = partial.dtype.element_ty
    element: tl.constexpr = row_high.dtype.element_ty
    part = tl.program_id(2)
    rows, columns = tl.num_programs(0) * BLOCK_N, column_tiles * BLOCK_M
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    factor = tl.load(scale)
    p_i, q_i = _load_weights(row_weight, factor, i, rows)
    class_i = tl.load(row_classes + i)
    rest_i = p_i
    if not UNIT:
        rest_i = tl.load(row_rest + i)
    at_row = i.to(tl.int64) * width
    if WHOLE:
        a, a_low = _load_rows(row_high, row_low, at_row, k, SPLIT)
    v = tl.zeros((BLOCK_N, BLOCK_V), dtype=acc)
    begin, end = _share(column_tiles, tl.num_programs(2), part)
    for tile in range(begin, end):
        j = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        at_column = j.to(tl.int64) * width
        if WHOLE:
            b, b_low = _load_rows(column_high, column_low, at_column, k, SPLIT)
            s = _products(a, a_low, tl.trans(b), tl.trans(b_low), acc, SPLIT)
        else:
            s = _similarity(
                row_high,
                row_low,
                column_high,
                column_low,
                at_row,
                at_column,
                width,
                acc,
                SPLIT,
                BLOCK_D,
            )
            b, b_low = _load_rows(column_high, column_low, at_column, k, SPLIT)
        p_j, q_j = _load_weights(column_weight, factor, j, columns)
        w = _pair_weights(
            s,
            rest_i,
            class_i,
            p_i,
            q_i,
            p_j,
            q_j,
            column_rest,
            column_classes,
            i,
            j,
            signed,
            OWN,
            UNIT,
        )
        w, w_low = _split(w, element, acc, SPLIT)
        if SPLIT:
            v += _products(w, w_low, b, b_low, acc, SPLIT)
        else:
            v = tl.dot(_operand(w), b, v, input_precision="ieee", out_dtype=acc)
    out = partial + ((part.to(tl.int64) * rows + i) * width)[:, None] + k[None, :]
    tl.store(out, v)


@triton.jit(do_not_specialize=["rows", "first", "column_tiles", "signed"])
def tile_weights(
    row_high,
    row_low,
    column_high,
    column_low,
    row_rest,
    column_rest,
    row_classes,
    column_classes,
    row_weight,
    column_weight,
    scale,
    similarities,
    high,
    low,
    rows,
    width,
    first,
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
    """One tile of weights, as `_pair_weights`, for a panel of rows from `first` on.

    MIRRORED: the panel is all of a symmetric S, and a tile below the diagonal's is written on both
    of its sides. A tile of inactive rows and columns is 0, and nothing is multiplied. 2 width FLOPs
    a pair, times three with SPLIT; writes 2 bytes a pair, or 4. Bound by the products. KEPT: S is
    read as `tile_sums` wrote it, 1 byte a pair, and bounds it by memory.
    """
    acc: tl.constexpr = row_weight.dtype.element_ty
    element: tl.constexpr = high.dtype.element_ty
    p = tl.program_id(0)
    columns = column_tiles * BLOCK_M  # so that the compiler knows a factor of this stride
    if MIRRORED:  # blocks are square
        r, c = _triangle(p)
    else:
        r, c = p // column_tiles, p % column_tiles
    i = first + r * BLOCK_N + tl.arange(0, BLOCK_N)
    j = c * BLOCK_M + tl.arange(0, BLOCK_M)
    factor = tl.load(scale)
    p_i, q_i = _load_weights(row_weight, factor, i, rows)
    p_j, q_j = _load_weights(column_weight, factor, j, columns)
    active = tl.max(((p_i != 0) | (q_i != 0)).to(tl.int32), axis=0)
    active += tl.max(((p_j != 0) | (q_j != 0)).to(tl.int32), axis=0)
    if KEPT:
        tile, at = _tile(similarities, r * BLOCK_N, c * BLOCK_M, columns, BLOCK_N, BLOCK_M)
        s = tl.load(tile + at, mask=(at >= 0) & (active > 0), other=0.0).to(acc)
    else:
        depth = tl.where(active > 0, width, 0)
        at_row, at_column = i.to(tl.int64) * width, j.to(tl.int64) * width
        s = _similarity(
            row_high,
            row_low,
            column_high,
            column_low,
            at_row,
            at_column,
            depth,
            acc,
            SPLIT,
            BLOCK_D,
        )
    rest_i = p_i
    if not UNIT:
        rest_i = tl.load(row_rest + i)
    w = _pair_weights(
        s,
        rest_i,
        tl.load(row_classes + i),
        p_i,
        q_i,
        p_j,
        q_j,
        column_rest,
        column_classes,
        i,
        j,
        signed,
        OWN,
        UNIT,
        KEPT,
    )
    w, w_low = _split(w, element, acc, SPLIT)
    tile, at = _tile(high, r * BLOCK_N, c * BLOCK_M, columns, BLOCK_N, BLOCK_M)
    tl.store(tile + at, w)
    if SPLIT:
        tile, at = _tile(low, r * BLOCK_N, c * BLOCK_M, columns, BLOCK_N, BLOCK_M)
        tl.store(tile + at, w_low)
    if MIRRORED:  # noqa: SIM102 - this is known when compiling, the rest is not
        if r != c:
            tile, at = _tile(high, c * BLOCK_M, r * BLOCK_N, columns, BLOCK_M, BLOCK_N)
            tl.store(tile + at, tl.trans(w))
            if SPLIT:
                tile, at = _tile(low, c * BLOCK_M, r * BLOCK_N, columns, BLOCK_M, BLOCK_N)
                tl.store(tile + at, tl.trans(w_low))


@triton.jit(do_not_specialize=["rows", "column_tiles", "first"])
def weighted_rows(
    weights_high,
    weights_low,
    column_high,
    column_low,
    partial,
    rows,
    column_tiles,
    width,
    first,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """partial[p, first + i, k]: the sum over the p-th share of j of weights[i, j] f_j[k].

    Where torch's product would keep one running sum over all j in a tensor core. 2 d FLOPs a pair,
    times three with SPLIT. Bound by the products.
    """
    acc: tl.constexpr = partial.dtype.element_ty
    local = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    part = tl.program_id(2)
    columns = column_tiles * BLOCK_M  # so that the compiler knows a factor of this stride
    total = tl.zeros((BLOCK_N, BLOCK_V), dtype=acc)
    begin, end = _share(column_tiles, tl.num_programs(2), part)
    for tile in range(begin, end):
        j = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        w, w_low = _load_rows(weights_high, weights_low, local.to(tl.int64) * columns, j, SPLIT)
        f, f_low = _load_rows(column_high, column_low, j.to(tl.int64) * width, k, SPLIT)
        total += _products(w, w_low, f, f_low, acc, SPLIT)
    out = partial + ((part.to(tl.int64) * rows + first + local) * width)[:, None] + k[None, :]
    tl.store(out, total)


@triton.jit
def _direction(
    partial, high, low, at, k, inside, part_stride, parts, acc: tl.constexpr, SPLIT: tl.constexpr
):
    """v_i, its parts added in order, and the prepared row."""
    u = tl.load(high + at + k, mask=inside, other=0.0).to(acc)
    if SPLIT:
        u += tl.load(low + at + k, mask=inside, other=0.0).to(acc)
    v = tl.load(partial + at + k, mask=inside, other=0.0)
    for part in range(1, parts):
        v += tl.load(partial + part * part_stride + at + k, mask=inside, other=0.0)
    return v, u


@triton.jit(do_not_specialize=["n", "rows", "parts", "one_upstream"])
def normalise_gradient(
    partial,
    high,
    low,
    rest,
    power,
    scale,
    upstream,
    gradient,
    n,
    d,
    width,
    rows,
    parts,
    one_upstream,
    SCALE: tl.constexpr,
    UNIT: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dL/df_i = (v_i - (v_i . f^_i) f^_i) / n_i of BLOCK_N rows: the normalisation's backward.

    partial[p, i, k] adds up to v_i times SCALE^3 `scale`, and times rest_i where rows are not UNIT;
    one_upstream: what comes from upstream, one number for all, is still to be multiplied in.
    Reads it and the rows twice, from a cache the second time; writes n d numbers. Bound by memory.
    """
    acc: tl.constexpr = partial.dtype.element_ty
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = (i.to(tl.int64) * width)[:, None]
    part_stride = rows.to(tl.int64) * width
    factor = (tl.load(power + i) / tl.load(scale) / (SCALE * SCALE * SCALE))[:, None]
    factor = factor * tl.where(one_upstream != 0, tl.load(upstream), 1.0)
    to_unit = tl.full((BLOCK_N, 1), 1.0 / SCALE, acc)
    if not UNIT:
        to_unit = tl.load(rest + i)[:, None]
    along = tl.zeros((BLOCK_N, BLOCK_D), dtype=acc)
    for start in range(0, width, BLOCK_D):
        k = start + tl.arange(0, BLOCK_D)[None, :]
        v, u = _direction(partial, high, low, at, k, k < width, part_stride, parts, acc, SPLIT)
        along += v * (u * to_unit)
    along = tl.sum(along, axis=1)[:, None]
    to = (i.to(tl.int64) * d)[:, None]
    for start in range(0, width, BLOCK_D):
        k = start + tl.arange(0, BLOCK_D)[None, :]
        v, u = _direction(partial, high, low, at, k, k < width, part_stride, parts, acc, SPLIT)
        v = v - along * (u * to_unit)
        v = tl.where(v == 0, 0.0, v * factor)  # inactive rows, whatever comes from upstream
        tl.store(gradient + to + k, v, mask=(i < n)[:, None] & (k < d))
