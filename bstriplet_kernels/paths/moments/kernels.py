"""Triton kernels of second moments, which `on_gpu` launches. Importing this needs triton.

Rows are unit rows in class order, stored times 2^8 as two float16 numbers, high + low: to 2^-23 of
their size. A product of two such matrices is three float16 products (low low^T is below 2^-22), or
one of the high parts alone where SPLIT is off. Tensor cores truncate their sums, always the same
way. So they add up only the products within a block; blocks are added by ordinary float32 sums.
float64 is one part, and its products are plain. Of the kernels here `split_rows`, `class_moments`,
`add_totals` and `band_sums` take it; `wide_kernels` have the others.

A class of `least` members or more is large and has matrices of its own. Their number is the first
multiple of `least` among its rows, over `least`: no two classes share one. Each program has a run
of consecutive rows. Every large class in the run has its first row, its last, or a multiple of
`least` in between, so that programs look there for classes.

Arguments that belong together are a tuple, which `on_gpu` describes: `rows` is a `SortedRows`,
`weights` a `Weights`, `sums` a `Sums`; `own`, `others`, `active` and `back` are `Matrices`. Sizes
are arguments of their own: Triton specialises on numbers in a tuple whatever `do_not_specialize`
says. In a kernel a block in two parts is a pair (high, low); without SPLIT, the same block twice.
"""

import triton
import triton.language as tl

UNIT = tl.constexpr(256.0)  # unit rows are stored times this, matrices' rows scaled to at most this


@triton.jit
def _norm(squared, squared_eps):
    """|f| from |f|^2, rounded to nearest; inf for a zero row, NaN where |f|^2 overflowed.

    The approximate rsqrt is 2e-7 off, and v - (v . u) u would keep twice that share of v along u.
    """
    root = tl.sqrt(squared) if squared.dtype == tl.float64 else tl.sqrt_rn(squared)
    norm = tl.where(squared <= squared_eps, float("inf"), root)
    return tl.where(squared == float("inf"), float("nan"), norm)


@triton.jit
def _over(x, y):
    """x / y, rounded to nearest; float32's own quotient is approximate."""
    if y.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def _split(x):
    """x = high + low, float16 each, to 2^-23 of x; float64 numbers are not split."""
    if x.dtype == tl.float64:
        return x, x
    else:
        high = x.to(tl.float16)
        return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def _load_parts(high, low, r, mask, c, DP: tl.constexpr, SPLIT: tl.constexpr):
    """Rows r, columns c of the matrices that begin at high and low; 0 where the mask is off."""
    at = r[:, None].to(tl.int64) * DP + c[None, :]
    block = tl.load(high + at, mask=mask[:, None], other=0.0)
    if SPLIT:
        return block, tl.load(low + at, mask=mask[:, None], other=0.0)
    else:
        return block, block


@triton.jit
def _load_rows(rows, r, mask, c, DP: tl.constexpr, SPLIT: tl.constexpr):
    """Columns c of rows r, in two parts; 0 where the mask is off."""
    return _load_parts(rows.high, rows.low, r, mask, c, DP, SPLIT)


@triton.jit
def _load_entries(matrices, number, r, c, DP: tl.constexpr, SPLIT: tl.constexpr):
    """Rows r, columns c of the matrix of that number, in two parts."""
    at = number.to(tl.int64) * DP * DP
    return _load_parts(matrices.high + at, matrices.low + at, r, r < DP, c, DP, SPLIT)


@triton.jit
def _whole(parts, SPLIT: tl.constexpr):
    """The numbers that two parts stand for."""
    if SPLIT:
        return parts[0].to(tl.float32) + parts[1].to(tl.float32)
    elif parts[0].dtype == tl.float64:
        return parts[0]
    else:
        return parts[0].to(tl.float32)


@triton.jit
def _transposed(parts):
    return tl.trans(parts[0]), tl.trans(parts[1])


@triton.jit
def _product(a, b, SPLIT: tl.constexpr):
    """a b of two split matrices; the small products first, so that they add up among themselves."""
    if SPLIT:
        d = tl.dot(a[1], b[0])
        d = tl.dot(a[0], b[1], d)
        d = tl.dot(a[0], b[0], d)
    elif a[0].dtype == tl.float64:
        d = tl.dot(a[0], b[0], input_precision="ieee", out_dtype=tl.float64)
    else:
        d = tl.dot(a[0], b[0])
    return d


@triton.jit
def _class_of(rows, row):
    """Where the class of a row begins and ends."""
    return tl.load(rows.first + row), tl.load(rows.last + row)


@triton.jit
def _run(run, n):
    """The rows [begin, end) of a program."""
    begin = tl.program_id(0) * run
    return begin, tl.minimum(begin + run, n)


@triton.jit
def _probes(begin, end, least):
    """In how many rows to look for the large classes of a run."""
    return (end - 1) // least - begin // least + 2


@triton.jit
def _probe(rows, t, begin, end, least):
    """(first row, last row + 1, number) of the class of the t-th row of `_probes`."""
    row = tl.where(t == 0, begin, tl.minimum((begin // least + t) * least, end - 1))
    c_first, c_last = _class_of(rows, row)
    return c_first, c_last, tl.cdiv(c_first, least)


@triton.jit
def _members(rows, r, mask):
    """How many rows the class of each row has."""
    last = tl.load(rows.last + r, mask=mask, other=0)
    return last - tl.load(rows.first + r, mask=mask, other=0)


@triton.jit
def _class_weights(members, n, ACC: tl.constexpr):
    """p_c and q_c, one over the number of positives and of negatives; 0 where there are none."""
    p = tl.where(members > 1, 1.0 / tl.maximum(members - 1, 1).to(ACC), 0.0)
    q = tl.where(members < n, 1.0 / tl.maximum(n - members, 1).to(ACC), 0.0)
    return p, q


@triton.jit
def _counted(members, n, columns, begin, end, mask):
    """How many columns are in classes [begin, end), and in all, as `_class_weights` takes them.

    It takes one off for the row itself. In a joint batch no row is a column, so both counts are one
    more. columns: how many there are before each row and, at n, in all; else None.
    """
    if columns is None:
        return members, n
    else:
        before = tl.load(columns + begin, mask=mask, other=0)
        return tl.load(columns + end, mask=mask, other=0) - before + 1, tl.load(columns + n) + 1


@triton.jit
def _is_column(columns, r, mask):
    """Which rows of a joint batch are columns."""
    after = tl.load(columns + r + 1, mask=mask, other=0)
    return after > tl.load(columns + r, mask=mask, other=0)


@triton.jit
def _bounds(labels, label, inside, n, steps):
    """The first of n sorted labels that is `label` or more, and the first that is more.

    By bisection: 2^steps > n.
    """
    low, high = tl.zeros(label.shape, tl.int32), tl.zeros(label.shape, tl.int32) + n
    below, above = low, high
    for _ in range(steps):
        middle = (low + high) // 2
        sought = inside & (low < high)
        less = tl.load(labels + middle, mask=sought, other=0) < label
        low, high = tl.where(sought & less, middle + 1, low), tl.where(less, high, middle)
        middle = (below + above) // 2
        sought = inside & (below < above)
        less = tl.load(labels + middle, mask=sought, other=0) <= label
        below, above = tl.where(sought & less, middle + 1, below), tl.where(less, above, middle)
    return low, below


@triton.jit
def _load_embeddings(embeddings, i, inside, k, d, stride_n, stride_d, ACC: tl.constexpr):
    """Columns k of rows i."""
    address = embeddings + i[:, None] * stride_n + k[None, :].to(tl.int64) * stride_d
    return tl.load(address, mask=inside[:, None] & (k < d)[None, :], other=0.0).to(ACC)


@triton.jit
def _split_side(
    embeddings, i, inside, place, rows, d, stride_n, stride_d, squared_eps,
    DP: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Store the unit rows of embeddings i, and 1 / norm, at `place` among `rows`."""
    ACC: tl.constexpr = rows.inverse.dtype.element_ty
    k = tl.arange(0, WIDTH)
    squared = tl.zeros(i.shape, ACC)
    if WIDTH == DP:
        f = _load_embeddings(embeddings, i, inside, k, d, stride_n, stride_d, ACC)
        squared = tl.sum(f * f, axis=1)
    else:
        for start in range(0, DP, WIDTH):
            f = _load_embeddings(embeddings, i, inside, start + k, d, stride_n, stride_d, ACC)
            squared += tl.sum(f * f, axis=1)
    norm = _norm(squared, tl.full((), squared_eps, ACC))
    tl.store(rows.inverse + place, _over(1.0, norm), mask=inside)
    for start in range(0, DP, WIDTH):
        if WIDTH < DP:
            f = _load_embeddings(embeddings, i, inside, start + k, d, stride_n, stride_d, ACC)
        high, low = _split(_over(f, norm[:, None]) * UNIT)
        at = place[:, None].to(tl.int64) * DP + (start + k)[None, :]
        tl.store(rows.high + at, high, mask=inside[:, None])
        if SPLIT:
            tl.store(rows.low + at, low, mask=inside[:, None])


@triton.jit(do_not_specialize=["n", "m", "d", "steps"])
def split_rows(
    embeddings,
    labels,
    ref_emb,
    ref_labels,
    ref_order,
    rows,
    order,
    columns_before,
    n,
    m,
    d,
    stride_n,
    stride_d,
    ref_stride_n,
    ref_stride_d,
    squared_eps: tl.float64,
    steps,
    DP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Fill `rows`, except their order where there is no ref_emb.

    labels are sorted, and `order` is where each was before; ref_labels and ref_order likewise. In a
    joint batch the rows of a class stand before its columns, whose numbers begin at n. Reads each
    number of both sides, writes as many: bound by memory. Takes WIDTH columns at a time; a row of
    several such parts is read twice.
    """
    block = tl.program_id(0)
    if ref_emb is None:
        r = block * BLOCK + tl.arange(0, BLOCK)
        inside = r < n
        label = tl.load(labels + r, mask=inside, other=0)
        first, last = _bounds(labels, label, inside, n, steps)
        tl.store(rows.first + r, first, mask=inside)
        tl.store(rows.last + r, last, mask=inside)
        i = tl.load(order + r, mask=inside, other=0)
        _split_side(
            embeddings, i, inside, r, rows, d, stride_n, stride_d, squared_eps, DP, WIDTH, SPLIT
        )
    else:
        row_blocks = tl.cdiv(n, BLOCK)
        is_row = block < row_blocks
        r = tl.where(is_row, block, block - row_blocks) * BLOCK + tl.arange(0, BLOCK)
        inside = r < tl.where(is_row, n, m)
        label = tl.load(labels + r, mask=inside & is_row, other=0)
        label += tl.load(ref_labels + r, mask=inside & (is_row == 0), other=0)
        first, last = _bounds(labels, label, inside, n, steps)
        first_column, last_column = _bounds(ref_labels, label, inside, m, steps)
        place = r + tl.where(is_row, first_column, last)
        tl.store(rows.first + place, first + first_column, mask=inside)
        tl.store(rows.last + place, last + last_column, mask=inside)
        tl.store(columns_before + place, tl.where(is_row, first_column, r), mask=inside)
        if block == 0:
            tl.store(columns_before + n + m, m)
        if is_row:
            i = tl.load(order + r, mask=inside, other=0)
            tl.store(rows.order + place, i, mask=inside)
            _split_side(
                embeddings, i, inside, place, rows, d, stride_n, stride_d, squared_eps,
                DP, WIDTH, SPLIT,
            )  # fmt: skip
        else:
            i = tl.load(ref_order + r, mask=inside, other=0)
            tl.store(rows.order + place, n + i, mask=inside)
            _split_side(
                ref_emb, i, inside, place, rows, d, ref_stride_n, ref_stride_d, squared_eps,
                DP, WIDTH, SPLIT,
            )  # fmt: skip


@triton.jit
def _weight(weights, rows, columns_before, r, mask, UNIFORM: tl.constexpr):
    """a_i over the largest a; where UNIFORM, 1 for active rows, 0 for others. r: in class order.

    Weights below 2^-20 of the largest lose digits. With weights, columns of a joint batch weigh 0.
    Without, its columns weigh 1 and its rows 0; every row of another batch weighs 1.
    """
    ACC: tl.constexpr = rows.inverse.dtype.element_ty
    if columns_before is not None:
        is_column = _is_column(columns_before, r, mask)
        mask = mask & (is_column if weights is None else is_column == 0)
    if weights is None:
        return mask.to(ACC)
    elif UNIFORM:
        return tl.load(weights.of_rows + r, mask=mask, other=0).to(ACC)
    else:
        i = tl.load(rows.order + r, mask=mask, other=0)
        a = tl.load(weights.of_rows + i, mask=mask, other=0.0)
        return tl.where(a == 0, 0.0, a / tl.load(weights.largest))


@triton.jit
def _add_total(total, matrix, count):
    """Store the matrix at `total`, or add it if count is not 0; in float64."""
    if count == 0:
        tl.store(total, matrix)
    else:
        tl.debug_barrier()  # another thread may have written what this one reads
        tl.store(total, tl.load(total) + matrix)


@triton.jit
def _part(part, DP: tl.constexpr, TILE: tl.constexpr, HALVED: tl.constexpr):
    """Rows and columns of the part-th TILE x TILE part of a matrix, where its numbers are stored,
    and how many numbers a matrix has.

    HALVED: only parts on and below the diagonal are stored, one after another.
    """
    t, parts = tl.arange(0, TILE), DP // TILE
    if HALVED:
        b = tl.arange(0, 16)  # row b of parts begins at number b (b + 1) / 2
        i = tl.sum((b * (b + 1) // 2 <= part).to(tl.int32), axis=0) - 1
        rows, columns = i * TILE + t, (part - i * (i + 1) // 2) * TILE + t
        within = part * (TILE * TILE) + t[:, None] * TILE + t[None, :]
        return rows, columns, within, parts * (parts + 1) // 2 * TILE * TILE
    else:
        rows, columns = part // parts * TILE + t, part % parts * TILE + t
        return rows, columns, rows[:, None] * DP + columns[None, :], DP * DP


@triton.jit
def _add_moment(
    acc, rows, r, mask, w, i, j,
    DP: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """acc + 2^16 sum_r w_r u_r u_r^T, rows i, columns j. WEIGHTED: w is not only 0 or 1."""
    mask = mask & (w != 0)
    u = _load_rows(rows, r, mask, i, DP, SPLIT)
    weighted = u
    if WEIGHTED:
        weighted = _split(_whole(u, SPLIT) * w[:, None])
    if DP > TILE:
        u = _load_rows(rows, r, mask, j, DP, SPLIT)
    return acc + _product(_transposed(weighted), u, SPLIT)


@triton.jit(do_not_specialize=["n", "run", "least"])
def class_moments(
    rows,
    weights,
    columns_before,
    sums,
    n,
    run,
    least,
    DP: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    UNIFORM: tl.constexpr,
    BY_Q: tl.constexpr,
    HALVED: tl.constexpr,
):
    """Sums of w_j u_j u_j^T over a run of rows: of each large class in it, and of all of them.

    Program (p, t) has the p-th run and the t-th TILE x TILE part of the matrices. Its sum of class
    number k goes to slots[p + k]: no other program writes there, and a class's slots follow each
    other. total[p] is the float64 sum over the run, from which these very numbers cancel again;
    with BY_Q a class counts there times q_c, one over the number of its negatives. small_rows[p]
    is how many rows are of small classes. 6 D^2 FLOPs a row (2 D^2 without SPLIT) on tensor cores,
    little more than half of that where HALVED.
    """
    p, part = tl.program_id(0), tl.program_id(1)
    ACC: tl.constexpr = rows.inverse.dtype.element_ty
    i, j, within, size = _part(part, DP, TILE, HALVED)
    begin, end = _run(run, n)
    total = sums.total + p.to(tl.int64) * size + within
    done, n_small, found = begin, end - begin, 0
    for t in range(_probes(begin, end, least)):
        c_first, c_last, number = _probe(rows, t, begin, end, least)
        start, stop = tl.maximum(begin, c_first), tl.minimum(end, c_last)
        members = c_last - c_first
        if (members >= least) & (stop > done):
            done = stop
            n_small -= stop - start
            acc = tl.zeros((TILE, TILE), ACC)
            for at in range(start, stop, BLOCK):
                r = at + tl.arange(0, BLOCK)
                mask = r < stop
                w = _weight(weights, rows, columns_before, r, mask, UNIFORM)
                acc = _add_moment(acc, rows, r, mask, w, i, j, DP, TILE, SPLIT, not UNIFORM)
            acc *= 1 / (UNIT * UNIT)
            tl.store(sums.slots + (p + number).to(tl.int64) * size + within, acc)
            counted = acc.to(tl.float64)
            if BY_Q:
                own, all_ = _counted(members, n, columns_before, c_first, c_last, True)
                counted *= _class_weights(own, all_, ACC)[1].to(tl.float64)
            _add_total(total, counted, found)
            found += 1
    if part == 0:
        tl.store(sums.small_rows + p, n_small)
    if n_small > 0:
        acc = tl.zeros((TILE, TILE), ACC)
        for at in range(begin, end, BLOCK):
            r = at + tl.arange(0, BLOCK)
            mask = r < end
            members = _members(rows, r, mask)
            mask = mask & (members < least)
            if tl.max(mask.to(tl.int32), axis=0) > 0:
                w = _weight(weights, rows, columns_before, r, mask, UNIFORM)
                if BY_Q:  # fewer than half of all rows: n q is between 1 and 2
                    begins = tl.load(rows.first + r, mask=mask, other=0)
                    own, all_ = _counted(members, n, columns_before, begins, begins + members, mask)
                    w *= all_.to(ACC) / tl.maximum(all_ - own, 1).to(ACC)
                acc = _add_moment(acc, rows, r, mask, w, i, j, DP, TILE, SPLIT, BY_Q)
        counted = acc.to(tl.float64) * (1 / (UNIT * UNIT))
        if BY_Q:
            counted /= _counted(n, n, columns_before, 0, 0, True)[1].to(tl.float64)
        _add_total(total, counted, found)


@triton.jit(do_not_specialize=["runs"])
def add_totals(totals, total, runs, SIZE: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    """The sum of `totals`, [runs, SIZE], in a fixed order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    depth = tl.arange(0, DEPTH)
    acc = tl.zeros((DEPTH, BLOCK), tl.float64)
    for s in range(0, runs, DEPTH):
        address = totals + (s + depth)[:, None].to(tl.int64) * SIZE + at[None, :]
        acc += tl.load(address, mask=(s + depth < runs)[:, None], other=0.0)
    tl.store(total + at, tl.sum(acc, axis=0))


@triton.jit
def _factor(largest):
    """The power of two that brings the largest number to 2^7 or above, but below 2^8.

    It is 1 for float64, which needs none.
    """
    if largest.dtype == tl.float64:
        return 1.0
    else:
        exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
        # 2^(7 - (exponent - 127)), in its bits; tiny and huge ones stay at the ends of the range
        power = tl.minimum(tl.maximum(127 + 7 - (exponent - 127), 2), 240)
        factor = (power << 23).to(tl.float32, bitcast=True)
        return tl.where(largest == 0, 1.0, factor)


@triton.jit
def _store_matrix(matrix, matrices, number, r, DP: tl.constexpr, SPLIT: tl.constexpr):
    """Store rows r of the matrix of that number, each times a power of two of its own."""
    at_row = number.to(tl.int64) * DP
    factor = _factor(tl.max(tl.abs(matrix), axis=1))
    high, low = _split(matrix * factor[:, None])
    at = at_row * DP + r[:, None] * DP + tl.arange(0, DP)[None, :]
    tl.store(matrices.high + at, high)
    if SPLIT:
        tl.store(matrices.low + at, low)
    tl.store(matrices.scale + at_row + r, 1 / (factor * UNIT))


@triton.jit
def _load_matrix(matrices, number, r, DP: tl.constexpr, SPLIT: tl.constexpr):
    """Rows r of the matrix of that number, as they were before `_store_matrix`."""
    at_row = number.to(tl.int64) * DP
    parts = _load_entries(matrices, number, r, tl.arange(0, DP), DP, SPLIT)
    return _whole(parts, SPLIT) * (tl.load(matrices.scale + at_row + r) * UNIT)[:, None]


@triton.jit
def _class_number(rows, k, n, least):
    """Where the class of number k begins and ends; n, n where there is none."""
    probe = k * least
    if probe < n:
        begin, end = _class_of(rows, probe)
        found = (end - begin >= least) & (tl.cdiv(begin, least) == k)
        begin, end = tl.where(found, begin, n), tl.where(found, end, n)
    else:
        begin, end = n, n
    return begin, end


@triton.jit
def _add_runs(slots, k, begin, end, run, within, SIZE: tl.constexpr):
    """The sum of class k over all runs, in float64."""
    acc = tl.zeros(within.shape, tl.float64)
    for p in range(begin // run, (end - 1) // run + 1):
        acc += tl.load(slots + (p + k).to(tl.int64) * SIZE + within).to(tl.float64)
    return acc


@triton.jit(do_not_specialize=["n", "run", "least"])
def moment_matrices(
    sums,
    rows,
    own,
    others,
    n,
    run,
    least,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """T_c and T - T_c of every large class; after the last T - T_c, T for small rows.

    Program (k, s) has ROWS rows of the matrices of number k. T is a float64 sum of the very numbers
    that make T_c, so the errors of T_c cancel in T - T_c, which is far smaller than T_c where
    similar rows are of one class.
    """
    k, classes = tl.program_id(0), tl.num_programs(0) - 1
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    within = r[:, None] * DP + tl.arange(0, DP)[None, :]
    begin, end = _class_number(rows, k, n, least)
    if (begin < n) | (k == classes):
        difference = tl.load(sums.total + within)
        if k < classes:
            moment = _add_runs(sums.slots, k, begin, end, run, within, DP * DP)
            difference -= moment
            _store_matrix(moment.to(tl.float32), own, k, r, DP, SPLIT)
        _store_matrix(difference.to(tl.float32), others, k, r, DP, SPLIT)


@triton.jit(do_not_specialize=["n", "run", "least"])
def gradient_matrices(
    sums,
    rows,
    own,
    others,
    active,
    back,
    n,
    run,
    least,
    sigma,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
    UNIFORM: tl.constexpr,
):
    """K_c and B_c of every large class (see `mathematics`), to `active` and `back`. UNIFORM:
    K_c + B_c instead of K_c, so that one product serves an active row.

    After the last, for small rows: K = 2 sigma T, which `row_gradients` multiplies by q_i, and
    B = 2 sigma sum_c q_c A_c. Program (k, s) has ROWS rows of the matrices of number k.
    """
    k, classes = tl.program_id(0), tl.num_programs(0) - 1
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    within = r[:, None] * DP + tl.arange(0, DP)[None, :]
    begin, end = _class_number(rows, k, n, least)
    if (begin < n) | (k == classes):
        of_all = tl.load(sums.total + within)
        of_active = _load_matrix(others, k, r, DP, SPLIT)
        if k < classes:
            p, q = _class_weights(end - begin, n, tl.float32)
            moment = _load_matrix(own, k, r, DP, SPLIT)
            weighted = _add_runs(sums.slots, k, begin, end, run, within, DP * DP)
            of_all = sigma * (of_all - q.to(tl.float64) * weighted) - p * weighted
            of_active = sigma * q * of_active - p * moment
            if UNIFORM:
                of_active += of_all.to(tl.float32)
        else:
            of_all *= sigma
            of_active *= sigma
        of_all = 2 * of_all.to(tl.float32)
        _store_matrix(2 * of_active, active, k, r, DP, SPLIT)
        _store_matrix(of_all, back, k, r, DP, SPLIT)


@triton.jit
def _held(matrices, number, DP: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr):
    """The whole matrix, transposed, for `_times`, where BLOCK_K is DP."""
    if DP == BLOCK_K:
        c = tl.arange(0, DP)
        return _transposed(_load_entries(matrices, number, c, c, DP, SPLIT))
    else:
        return 0, 0


@triton.jit
def _times(
    u, held, rows, r, mask, matrices, number,
    DP: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """M u without the scales of M's rows, [rows, DP]. An M that is not held is read here, BLOCK_K
    columns at a time.
    """
    if DP == BLOCK_K:
        return _product(u, held, SPLIT)
    else:
        c = tl.arange(0, DP)
        y = tl.zeros((r.shape[0], DP), tl.float32)
        for start in range(0, DP, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            part = _load_rows(rows, r, mask, k, DP, SPLIT)
            matrix = _load_entries(matrices, number, c, k, DP, SPLIT)
            y += _product(part, _transposed(matrix), SPLIT)
        return y


@triton.jit
def _hinge(positive, negative, means, i, inside, margin, sigma):
    """Store both means of rows i; return max(0, h_i) and whether h_i > 0, as bytes."""
    tl.store(means.positive + i, positive, mask=inside)
    tl.store(means.negative + i, negative, mask=inside)
    hinge = margin - positive + sigma * negative
    is_inactive = hinge <= 0  # false for NaN, which counts as active
    loss = tl.where(is_inactive | (inside == 0), 0.0, hinge)
    return loss, tl.where(is_inactive, 0, 1).to(tl.uint8)


@triton.jit
def _store_means(
    own_form, others_form, squared, members, rows, r, inside, is_active, means, losses,
    n, margin, sigma, BY_ROW: tl.constexpr,
):  # fmt: skip
    """Store both means of rows from their forms, and whether h_i > 0; return losses, [rows]."""
    p, q = _class_weights(members, n, rows.inverse.dtype.element_ty)
    positive_mean = p * (own_form - squared * squared)
    negative_mean = q * others_form
    i = tl.load(rows.order + r, mask=inside, other=0)
    loss, flag = _hinge(positive_mean, negative_mean, means, i, inside, margin, sigma)
    if BY_ROW:
        tl.store(is_active + i, flag, mask=inside)
        tl.store(losses + i, loss, mask=inside)
    else:
        tl.store(is_active + r, flag, mask=inside)
    return loss


@triton.jit(do_not_specialize=["n", "run", "least", "classes"])
def row_means(
    rows,
    small_rows,
    in_band,
    own,
    others,
    is_active,
    means,
    losses,
    n,
    run,
    least,
    classes,
    margin: tl.float64,
    sigma,
    scale: tl.float64,
    DP: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    BY_ROW: tl.constexpr,
):
    """Eq. 3's two means of a run of rows, in the given order, by two quadratic forms each.

    in_band: sums of small rows over their own class. is_active: whether h_i > 0, in class order.
    losses[p]: the sum over the run of max(0, h_i), times `scale`. BY_ROW: is_active is in the given
    order, and so are losses, one a row without `scale`. 12 D^2 FLOPs a row (4 D^2 without SPLIT),
    half of that for small rows.
    """
    begin, end = _run(run, n)
    c = tl.arange(0, DP)
    margin_ = tl.full((), margin, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    done = begin
    for t in range(_probes(begin, end, least)):
        c_first, c_last, number = _probe(rows, t, begin, end, least)
        start, stop = tl.maximum(begin, c_first), tl.minimum(end, c_last)
        members = c_last - c_first
        if (members >= least) & (stop > done):
            done = stop
            t_scale = tl.load(own.scale + number.to(tl.int64) * DP + c)
            x_scale = tl.load(others.scale + number.to(tl.int64) * DP + c)
            t_held = _held(own, number, DP, BLOCK_K, SPLIT)
            x_held = _held(others, number, DP, BLOCK_K, SPLIT)
            for at in range(start, stop, BLOCK):
                r = at + tl.arange(0, BLOCK)
                inside = r < stop
                parts = _load_rows(rows, r, inside, c, DP, SPLIT)
                t_u = _times(parts, t_held, rows, r, inside, own, number, DP, BLOCK_K, SPLIT)
                x_u = _times(parts, x_held, rows, r, inside, others, number, DP, BLOCK_K, SPLIT)
                u = _whole(parts, SPLIT) * (1 / UNIT)
                own_form = tl.sum(t_u * t_scale[None, :] * u, axis=1)
                others_form = tl.sum(x_u * x_scale[None, :] * u, axis=1)
                total += _store_means(
                    own_form, others_form, tl.sum(u * u, axis=1), members, rows, r, inside,
                    is_active, means, losses, n, margin_, sigma, BY_ROW,
                )  # fmt: skip
    if tl.load(small_rows + tl.program_id(0)) > 0:
        x_scale = tl.load(others.scale + classes.to(tl.int64) * DP + c)
        x_held = _held(others, classes, DP, BLOCK_K, SPLIT)
        for at in range(begin, end, BLOCK):
            r = at + tl.arange(0, BLOCK)
            inside = r < end
            members = _members(rows, r, inside)
            inside = inside & (members < least)
            if tl.max(inside.to(tl.int32), axis=0) > 0:
                parts = _load_rows(rows, r, inside, c, DP, SPLIT)
                x_u = _times(parts, x_held, rows, r, inside, others, classes, DP, BLOCK_K, SPLIT)
                u = _whole(parts, SPLIT) * (1 / UNIT)
                squared = tl.sum(u * u, axis=1)
                own_form = tl.load(in_band + r, mask=inside, other=0.0) + squared * squared
                others_form = tl.sum(x_u * x_scale[None, :] * u, axis=1) - own_form
                total += _store_means(
                    own_form, others_form, squared, members, rows, r, inside,
                    is_active, means, losses, n, margin_, sigma, BY_ROW,
                )  # fmt: skip
    if not BY_ROW:
        tl.store(losses + tl.program_id(0), tl.sum(total, axis=0) * tl.full((), scale, tl.float32))


@triton.jit
def _band(rows, r, inside, least, n):
    """Which rows share a small class with others, where each's class begins, and the rows
    [begin, end) of all these classes.
    """
    c_first = tl.load(rows.first + r, mask=inside, other=0)
    c_last = tl.load(rows.last + r, mask=inside, other=0)
    small = inside & (c_last - c_first < least) & (c_last - c_first > 1)
    begin = tl.min(tl.where(small, c_first, n), axis=0)
    end = tl.max(tl.where(small, c_last, 0), axis=0)
    return small, c_first, begin, end


@triton.jit
def _band_similarity(
    rows, i, own, j, others, DP: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr
):
    """s_ij of two blocks of rows."""
    s = tl.zeros((i.shape[0], j.shape[0]), rows.inverse.dtype.element_ty)
    for start in range(0, DP, BLOCK_D):
        c = start + tl.arange(0, BLOCK_D)
        u_i = _load_rows(rows, i, own, c, DP, SPLIT)
        u_j = _load_rows(rows, j, others, c, DP, SPLIT)
        s += _product(u_i, _transposed(u_j), SPLIT)
    return s * (1 / (UNIT * UNIT))


@triton.jit(do_not_specialize=["n", "run", "least"])
def band_sums(
    rows,
    columns_before,
    small_rows,
    in_band,
    n,
    run,
    least,
    DP: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """The sum of s_ij^2 over the columns in a small row's own class, itself left out.

    Program (p, s) has every num_programs(1)-th block of the p-th run; it ends at once if the run
    has no small rows.
    """
    begin, end = _run(run, n)
    if tl.load(small_rows + tl.program_id(0)) == 0:
        end = begin
    for block in range(begin + tl.program_id(1) * BLOCK, end, tl.num_programs(1) * BLOCK):
        r = block + tl.arange(0, BLOCK)
        small, c_first, near, far = _band(rows, r, r < end, least, n)
        total = tl.zeros((BLOCK,), rows.inverse.dtype.element_ty)
        for at in range(near, far, BLOCK):
            j = at + tl.arange(0, BLOCK)
            inside = j < far
            s = _band_similarity(rows, r, small, j, inside, DP, BLOCK_D, SPLIT)
            pair = c_first[:, None] == tl.load(rows.first + j, mask=inside, other=-1)[None, :]
            pair = pair & small[:, None]
            if columns_before is None:
                pair = pair & (r[:, None] != j[None, :])
            else:
                pair = pair & _is_column(columns_before, j, inside)[None, :]
            total += tl.sum(tl.where(pair, s * s, 0.0), axis=1)
        tl.store(in_band + r, total, mask=r < end)


@triton.jit(do_not_specialize=["n", "run", "least", "stride"])
def band_gradient(
    rows,
    small_rows,
    weights,
    gradient,
    n,
    run,
    least,
    d,
    stride,
    sigma,
    DP: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SPLIT: tl.constexpr,
    UNIFORM: tl.constexpr,
):
    """Write to `gradient` what a small row's own class adds to dL/du_i over the largest weight.

    -2 (p + sigma q) sum_j (w_i + w_j) s_ij u_j. Program (p, s, t) has BLOCK_V columns of every
    num_programs(1)-th block of the p-th run; it ends at once without small rows.
    """
    begin, end = _run(run, n)
    if tl.load(small_rows + tl.program_id(0)) == 0:
        end = begin
    k = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    for block in range(begin + tl.program_id(1) * BLOCK, end, tl.num_programs(1) * BLOCK):
        r = block + tl.arange(0, BLOCK)
        small, c_first, near, far = _band(rows, r, r < end, least, n)
        if near < far:
            w_i = _weight(weights, rows, None, r, small, UNIFORM)
            v = tl.zeros((BLOCK, BLOCK_V), tl.float32)
            for at in range(near, far, BLOCK):
                j = at + tl.arange(0, BLOCK)
                inside = j < far
                s = _band_similarity(rows, r, small, j, inside, DP, BLOCK_D, SPLIT)
                pair = c_first[:, None] == tl.load(rows.first + j, mask=inside, other=-1)[None, :]
                pair = pair & (r[:, None] != j[None, :]) & small[:, None]
                w_j = _weight(weights, rows, None, j, inside, UNIFORM)
                weight = tl.where(pair, s * (w_i[:, None] + w_j[None, :]), 0.0)
                weight = _split(weight * (UNIT / 2))
                v += _product(weight, _load_rows(rows, j, inside, k, DP, SPLIT), SPLIT)
            p, q = _class_weights(_members(rows, r, small), n, tl.float32)
            v *= ((p + sigma * q) * (-4 / (UNIT * UNIT)))[:, None]
            i = tl.load(rows.order + r, mask=small, other=0)
            out = gradient + i[:, None] * stride + k[None, :]
            tl.store(out, v, mask=small[:, None] & (k < d)[None, :])


@triton.jit
def _project(v, u, along, rows, r, mask, factor):
    """dL/df = (v - (v . u) u) / |f|, times `factor`; along = v . u."""
    v -= along[:, None] * u
    v *= tl.load(rows.inverse + r, mask=mask, other=0.0)[:, None]
    return tl.where(v == 0, 0.0, v * factor)  # not NaN if upstream is infinite and no row active


@triton.jit
def _store_gradient(v, parts, rows, r, out, mask, written, factor, SPLIT: tl.constexpr):
    """Store the gradient of rows r from the whole of v."""
    u = _whole(parts, SPLIT) * (1 / UNIT)
    along = tl.sum(v * u, axis=1)
    tl.store(out, _project(v, u, along, rows, r, mask, factor), mask=written)


@triton.jit(do_not_specialize=["n", "run", "least", "classes", "stride"])
def row_gradients(
    rows,
    small_rows,
    weights,
    active,
    back,
    gradient,
    n,
    run,
    least,
    classes,
    d,
    stride,
    scale: tl.float64,
    DP: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    UNIFORM: tl.constexpr,
):
    """dL/df of a run of rows, in the given order, from v = w K u + B u: dL/du over the largest a.

    `gradient` holds what `band_gradient` found for small rows. Two products, 12 D^2 FLOPs a row
    (4 D^2 without SPLIT), or one where UNIFORM and all of a class's rows in the run are active.
    Reads and writes a row once where matrices are held as a whole.
    """
    # rows of a block beside two whole matrices, which leave less shared memory
    FEWER: tl.constexpr = BLOCK // 2 if DP == BLOCK_K else BLOCK
    begin, end = _run(run, n)
    c = tl.arange(0, DP)
    factor = (tl.load(weights.largest) * scale).to(tl.float32)
    small = tl.load(small_rows + tl.program_id(0)) > 0
    probes = _probes(begin, end, least)
    done = begin
    for t in range(probes + 1):
        c_first, c_last, number = _probe(rows, t, begin, end, least)
        start, stop = tl.maximum(begin, c_first), tl.minimum(end, c_last)
        of_small = t == probes
        wanted = (c_last - c_first >= least) & (stop > done)
        if of_small:
            number, start, stop, wanted = classes, begin, end, small
        if wanted:
            done = stop
            k_scale = tl.load(active.scale + number.to(tl.int64) * DP + c)
            k_held = _held(active, number, DP, BLOCK_K, SPLIT)
            n_inactive = 1
            if UNIFORM:
                counted = tl.zeros((512,), tl.int32)
                for at in range(start, stop, 512):
                    r = at + tl.arange(0, 512)
                    flags = tl.load(weights.of_rows + r, mask=r < stop, other=1)
                    counted += (flags == 0).to(tl.int32)
                n_inactive = tl.sum(counted, axis=0)
            if (n_inactive == 0) & (of_small == 0):
                for at in range(start, stop, BLOCK):
                    r = at + tl.arange(0, BLOCK)
                    inside = r < stop
                    u = _load_rows(rows, r, inside, c, DP, SPLIT)
                    v = _times(u, k_held, rows, r, inside, active, number, DP, BLOCK_K, SPLIT)
                    v *= k_scale[None, :]
                    i = tl.load(rows.order + r, mask=inside, other=0)
                    out = gradient + i[:, None] * stride + c[None, :]
                    written = inside[:, None] & (c < d)[None, :]
                    _store_gradient(v, u, rows, r, out, inside, written, factor, SPLIT)
            else:
                b_scale = tl.load(back.scale + number.to(tl.int64) * DP + c)
                b_held = _held(back, number, DP, BLOCK_K, SPLIT)
                for at in range(start, stop, FEWER):
                    r = at + tl.arange(0, FEWER)
                    inside = r < stop
                    members = _members(rows, r, inside)
                    inside = inside & ((members < least) | (of_small == 0))
                    u = _load_rows(rows, r, inside, c, DP, SPLIT)
                    w = _weight(weights, rows, None, r, inside, UNIFORM)
                    v = _times(u, k_held, rows, r, inside, active, number, DP, BLOCK_K, SPLIT)
                    v *= k_scale[None, :]
                    b = _times(u, b_held, rows, r, inside, back, number, DP, BLOCK_K, SPLIT)
                    b *= b_scale[None, :]
                    i = tl.load(rows.order + r, mask=inside, other=0)
                    out = gradient + i[:, None] * stride + c[None, :]
                    written = inside[:, None] & (c < d)[None, :]
                    if of_small:
                        w *= _class_weights(members, n, tl.float32)[1]
                        b += tl.load(out, mask=written & (members > 1)[:, None], other=0.0)
                        v = v * w[:, None] + b
                    elif UNIFORM:
                        v = tl.where((w != 0)[:, None], v, b)
                    else:
                        v = v * w[:, None] + b
                    _store_gradient(v, u, rows, r, out, inside, written, factor, SPLIT)
