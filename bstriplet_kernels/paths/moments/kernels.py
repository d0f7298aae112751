"""Triton kernels of second moments, which `on_gpu` launches. Importing this needs triton.

Rows are in class order, as unit rows times 2^8 in two float16 numbers, high + low: to 2^-23 of
their size. A product of two such matrices is three float16 products (low low^T is below 2^-22), or
one of the high parts alone where SPLIT is off. Tensor cores truncate what they add up, always the
same way, so that only a block's products are added there and blocks are by ordinary float32 sums.

A class of `least` members or more is large: it has matrices of its own, whose number is the first
multiple of `least` among its rows, over `least`: no two classes share one. Each program has a run
of consecutive rows; a large class that has rows in it has the first of them, the last, or a
multiple of `least` in between.
"""

import triton
import triton.language as tl

UNIT = tl.constexpr(256.0)  # unit rows are stored times this, matrices' rows up to it


@triton.jit
def _norm(squared, squared_eps):
    """|f| from |f|^2, rounded to nearest; inf for a zero row, NaN where |f|^2 overflowed.

    The approximate rsqrt is 2e-7 off, and v - (v . u) u would keep twice that share of v along u.
    """
    norm = tl.where(squared <= squared_eps, float("inf"), tl.sqrt_rn(squared))
    return tl.where(squared == float("inf"), float("nan"), norm)


@triton.jit
def _split(x):
    """x = high + low, float16 each, to 2^-23 of x."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def _load_rows(high, low, r, mask, c, DP: tl.constexpr, SPLIT: tl.constexpr):
    """Rows r, columns c, of both parts; 0 where the mask is off."""
    at = r[:, None].to(tl.int64) * DP + c[None, :]
    uh = tl.load(high + at, mask=mask[:, None], other=0.0)
    if SPLIT:
        return uh, tl.load(low + at, mask=mask[:, None], other=0.0)
    else:
        return uh, uh


@triton.jit
def _whole(uh, ul, SPLIT: tl.constexpr):
    """The numbers that two parts stand for."""
    if SPLIT:
        return uh.to(tl.float32) + ul.to(tl.float32)
    else:
        return uh.to(tl.float32)


@triton.jit
def _product(a_high, a_low, b_high, b_low, SPLIT: tl.constexpr):
    """a b of two split matrices; the small products first, so that they add up among themselves."""
    if SPLIT:
        d = tl.dot(a_low, b_high)
        d = tl.dot(a_high, b_low, d)
        d = tl.dot(a_high, b_high, d)
    else:
        d = tl.dot(a_high, b_high)
    return d


@triton.jit
def _class_of(first, last, row):
    """Where the class of a row begins and ends."""
    return tl.load(first + row), tl.load(last + row)


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
def _probe(first, last, t, begin, end, least):
    """(first row, last row + 1, number) of the class that has the t-th of these rows."""
    row = tl.where(t == 0, begin, tl.minimum((begin // least + t) * least, end - 1))
    c_first = tl.load(first + row)
    return c_first, tl.load(last + row), tl.cdiv(c_first, least)


@triton.jit
def _members(first, last, r, mask):
    """How many rows the class of each row has."""
    return tl.load(last + r, mask=mask, other=0) - tl.load(first + r, mask=mask, other=0)


@triton.jit
def _class_weights(members, n):
    """p_c and q_c, one over the number of positives and of negatives; 0 where there are none."""
    p = tl.where(members > 1, 1.0 / tl.maximum(members - 1, 1).to(tl.float32), 0.0)
    q = tl.where(members < n, 1.0 / tl.maximum(n - members, 1).to(tl.float32), 0.0)
    return p, q


@triton.jit
def _load_embeddings(embeddings, i, inside, k, d, stride_n, stride_d):
    """Columns k of given rows, in float32."""
    address = embeddings + i[:, None] * stride_n + k[None, :].to(tl.int64) * stride_d
    return tl.load(address, mask=inside[:, None] & (k < d)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _counted(members, n, columns, begin, end, mask):
    """Members of classes that begin and end there, and of all, as `_class_weights` counts them.

    Where rows are compared with other columns, each is one more in both. `columns`: how many there
    are before each row and, at n, in all.
    """
    if columns is None:
        return members, n
    else:
        before = tl.load(columns + begin, mask=mask, other=0)
        return tl.load(columns + end, mask=mask, other=0) - before + 1, tl.load(columns + n) + 1


@triton.jit
def _is_column(columns, r, mask):
    """Which rows are columns, where they are compared with others than themselves."""
    after = tl.load(columns + r + 1, mask=mask, other=0)
    return after > tl.load(columns + r, mask=mask, other=0)


@triton.jit(do_not_specialize=["n", "d", "steps"])
def split_rows(
    embeddings,
    labels,
    high,
    low,
    inverse,
    order,
    first,
    last,
    n,
    d,
    stride_n,
    stride_d,
    squared_eps: tl.float64,
    steps,
    DP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Rows in class order: their class, 1 / norm, and unit rows in two parts.

    labels, order: sorted labels, and the given index of each row. first, last: where its class
    begins and ends, by `steps` of bisection. Reads n d numbers, writes as many: bound by memory.
    Takes WIDTH columns at a time; a row of several such parts is read twice.
    """
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = r < n
    label = tl.load(labels + r, mask=inside, other=0)
    # labels[below] < label <= labels[begin]; labels[end - 1] <= label < labels[above]
    below, begin = tl.full((BLOCK,), -1, tl.int32), r
    end, above = r, tl.zeros((BLOCK,), tl.int32) + n
    for _ in range(steps):
        middle = (below + begin) // 2
        less = tl.load(labels + middle, mask=inside & (middle >= 0), other=0) < label
        less = less | (middle < 0)
        below = tl.where(less, tl.maximum(middle, below), below)
        begin = tl.where(less, begin, middle)
        middle = end + (above - end + 1) // 2
        more = tl.load(labels + middle, mask=inside & (middle < n), other=0) > label
        more = more | (middle >= n)
        above = tl.where(more, tl.minimum(middle, above), above)
        end = tl.where(more, end, middle)
    tl.store(first + r, begin, mask=inside)
    tl.store(last + r, end + 1, mask=inside)

    i = tl.load(order + r, mask=inside, other=0)
    k = tl.arange(0, WIDTH)
    squared = tl.zeros((BLOCK,), tl.float32)
    if WIDTH == DP:
        f = _load_embeddings(embeddings, i, inside, k, d, stride_n, stride_d)
        squared = tl.sum(f * f, axis=1)
    else:
        for start in range(0, DP, WIDTH):
            f = _load_embeddings(embeddings, i, inside, start + k, d, stride_n, stride_d)
            squared += tl.sum(f * f, axis=1)
    norm = _norm(squared, tl.full((), squared_eps, tl.float32))
    tl.store(inverse + r, tl.div_rn(1.0, norm), mask=inside)
    for start in range(0, DP, WIDTH):
        if WIDTH < DP:
            f = _load_embeddings(embeddings, i, inside, start + k, d, stride_n, stride_d)
        uh, ul = _split(tl.div_rn(f, norm[:, None]) * UNIT)
        at = r[:, None].to(tl.int64) * DP + (start + k)[None, :]
        tl.store(high + at, uh, mask=inside[:, None])
        if SPLIT:
            tl.store(low + at, ul, mask=inside[:, None])


@triton.jit
def _weight(weights, largest, order, r, mask, UNIFORM: tl.constexpr):
    """a_i over the largest; where UNIFORM 1 for active rows, else 0. Rows in class order.

    What is below 2^-20 of the largest loses digits.
    """
    if weights is None:
        return mask.to(tl.float32)
    elif UNIFORM:
        return tl.load(weights + r, mask=mask, other=0).to(tl.float32)
    else:
        a = tl.load(weights + tl.load(order + r, mask=mask, other=0), mask=mask, other=0.0)
        return tl.where(a == 0, 0.0, a / tl.load(largest))


@triton.jit
def _add_total(total, matrix, count):
    """total = or += matrix, in memory and in float64."""
    if count == 0:
        tl.store(total, matrix)
    else:
        tl.debug_barrier()  # another thread may have written what this one reads
        tl.store(total, tl.load(total) + matrix)


@triton.jit
def _part(part, DP: tl.constexpr, TILE: tl.constexpr, HALVED: tl.constexpr):
    """Rows and columns of the part-th TILE x TILE part of a matrix, where its numbers stand, and
    how many of these a matrix has.

    HALVED: of the parts on and below the diagonal alone, which follow each other.
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


@triton.jit(do_not_specialize=["n", "run", "least"])
def class_moments(
    high,
    low,
    weights,
    largest,
    order,
    first,
    last,
    columns_before,
    slots,
    totals,
    small_rows,
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

    Program (p, t) has the p-th run and the t-th TILE x TILE part of the matrices. What it finds of
    class number k is slots[p + k]: no other program writes there, and a class's slots follow each
    other. totals[p] is the sum over the run in float64, where these very numbers cancel again; with
    BY_Q a class counts there times q_c, one over the number of its negatives. small_rows[p]:
    how many rows are of small classes. 6 D^2 FLOPs a row (2 D^2 without SPLIT) on tensor cores,
    little more than half of that where HALVED.
    """
    p, part = tl.program_id(0), tl.program_id(1)
    rows, columns, within, size = _part(part, DP, TILE, HALVED)
    begin, end = _run(run, n)
    total = totals + p.to(tl.int64) * size + within
    done, n_small, found = begin, end - begin, 0
    for t in range(_probes(begin, end, least)):
        c_first, c_last, number = _probe(first, last, t, begin, end, least)
        start, stop = tl.maximum(begin, c_first), tl.minimum(end, c_last)
        members = c_last - c_first
        if (members >= least) & (stop > done):
            done = stop
            n_small -= stop - start
            acc = tl.zeros((TILE, TILE), tl.float32)
            for at in range(start, stop, BLOCK):
                r = at + tl.arange(0, BLOCK)
                mask = r < stop
                w = _weight(weights, largest, order, r, mask, UNIFORM)
                uh, ul = _load_rows(high, low, r, mask & (w != 0), rows, DP, SPLIT)
                if UNIFORM:
                    wh, wl = uh, ul
                else:
                    wh, wl = _split(_whole(uh, ul, SPLIT) * w[:, None])
                if DP > TILE:
                    uh, ul = _load_rows(high, low, r, mask & (w != 0), columns, DP, SPLIT)
                acc += _product(tl.trans(wh), tl.trans(wl), uh, ul, SPLIT)
            acc *= 1 / (UNIT * UNIT)
            tl.store(slots + (p + number).to(tl.int64) * size + within, acc)
            counted = acc.to(tl.float64)
            if BY_Q:
                own, all_ = _counted(members, n, columns_before, c_first, c_last, True)
                counted *= _class_weights(own, all_)[1].to(tl.float64)
            _add_total(total, counted, found)
            found += 1
    if part == 0:
        tl.store(small_rows + p, n_small)
    if n_small > 0:
        acc = tl.zeros((TILE, TILE), tl.float32)
        for at in range(begin, end, BLOCK):
            r = at + tl.arange(0, BLOCK)
            mask = r < end
            members = _members(first, last, r, mask)
            mask = mask & (members < least)
            if tl.max(mask.to(tl.int32), axis=0) > 0:
                w = _weight(weights, largest, order, r, mask, UNIFORM)
                uh, ul = _load_rows(high, low, r, mask & (w != 0), rows, DP, SPLIT)
                if BY_Q:  # fewer than half of all rows: n q is between 1 and 2
                    begins = tl.load(first + r, mask=mask, other=0)
                    own, all_ = _counted(members, n, columns_before, begins, begins + members, mask)
                    q = all_.to(tl.float32) / tl.maximum(all_ - own, 1).to(tl.float32)
                    wh, wl = _split(_whole(uh, ul, SPLIT) * (w * q)[:, None])
                else:
                    wh, wl = uh, ul
                if DP > TILE:
                    uh, ul = _load_rows(high, low, r, mask & (w != 0), columns, DP, SPLIT)
                acc += _product(tl.trans(wh), tl.trans(wl), uh, ul, SPLIT)
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
    """A power of two, times which the largest number is 2^7 to 2^8."""
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    # 2^(7 - (exponent - 127)), in its bits; tiny and huge ones are left at the ends of the range
    power = tl.minimum(tl.maximum(127 + 7 - (exponent - 127), 2), 240)
    factor = (power << 23).to(tl.float32, bitcast=True)
    return tl.where(largest == 0, 1.0, factor)


@triton.jit
def _store_matrix(matrix, high, low, scale, at_row, rows, DP: tl.constexpr, SPLIT: tl.constexpr):
    """Rows of a matrix, each times a power of two of its own."""
    columns = tl.arange(0, DP)
    factor = _factor(tl.max(tl.abs(matrix), axis=1))
    uh, ul = _split(matrix * factor[:, None])
    at = at_row * DP + rows[:, None] * DP + columns[None, :]
    tl.store(high + at, uh)
    if SPLIT:
        tl.store(low + at, ul)
    tl.store(scale + at_row + rows, 1 / (factor * UNIT))


@triton.jit
def _load_matrix(high, low, scale, number, rows, DP: tl.constexpr, SPLIT: tl.constexpr):
    """Rows of the matrix of that number, as they were before `_store_matrix`."""
    columns = tl.arange(0, DP)
    at_row = number.to(tl.int64) * DP
    uh, ul = _load_rows(high + at_row * DP, low + at_row * DP, rows, rows < DP, columns, DP, SPLIT)
    return _whole(uh, ul, SPLIT) * (tl.load(scale + at_row + rows) * UNIT)[:, None]


@triton.jit
def _class_number(first, last, k, n, least):
    """Where the class of number k begins and ends; n, n where there is none."""
    probe = k * least
    if probe < n:
        begin, end = _class_of(first, last, probe)
        found = (end - begin >= least) & (tl.cdiv(begin, least) == k)
        begin, end = tl.where(found, begin, n), tl.where(found, end, n)
    else:
        begin, end = n, n
    return begin, end


@triton.jit
def _add_slots(slots, k, begin, end, run, within, SIZE: tl.constexpr):
    """What all runs found of class k, in float64."""
    acc = tl.zeros(within.shape, tl.float64)
    for p in range(begin // run, (end - 1) // run + 1):
        acc += tl.load(slots + (p + k).to(tl.int64) * SIZE + within).to(tl.float64)
    return acc


@triton.jit(do_not_specialize=["n", "run", "least"])
def moment_matrices(
    slots,
    total,
    first,
    last,
    own_high,
    own_low,
    own_scale,
    others_high,
    others_low,
    others_scale,
    n,
    run,
    least,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """T_c and T - T_c of every large class; T for small rows, in place of the last T - T_c.

    Program (k, s) has ROWS rows of the matrices of number k. The difference is of sums in float64,
    in which T_c itself cancels whatever its error is: where similar rows are of one class, T - T_c
    is far smaller than T_c.
    """
    k, classes = tl.program_id(0), tl.num_programs(0) - 1
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    within = rows[:, None] * DP + tl.arange(0, DP)[None, :]
    at_row = k.to(tl.int64) * DP
    begin, end = _class_number(first, last, k, n, least)
    if (begin < n) | (k == classes):
        others = tl.load(total + within)
        if k < classes:
            own = _add_slots(slots, k, begin, end, run, within, DP * DP)
            others -= own
            _store_matrix(own.to(tl.float32), own_high, own_low, own_scale, at_row, rows, DP, SPLIT)
        others = others.to(tl.float32)
        _store_matrix(others, others_high, others_low, others_scale, at_row, rows, DP, SPLIT)


@triton.jit(do_not_specialize=["n", "run", "least"])
def gradient_matrices(
    slots,
    total,
    first,
    last,
    own_high,
    own_low,
    own_scale,
    others_high,
    others_low,
    others_scale,
    active_high,
    active_low,
    active_scale,
    back_high,
    back_low,
    back_scale,
    n,
    run,
    least,
    sigma,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
    UNIFORM: tl.constexpr,
):
    """K_c and B_c of every large class (see `mathematics`): what makes dL/du_i of an active row
    and of one that is not. UNIFORM: active rows have K_c + B_c at once.

    For small rows K = 2 sigma T, which q_i is to multiply, and B = 2 sigma sum_c q_c A_c. Program
    (k, s) has ROWS rows of the matrices of number k.
    """
    k, classes = tl.program_id(0), tl.num_programs(0) - 1
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    within = rows[:, None] * DP + tl.arange(0, DP)[None, :]
    at_row = k.to(tl.int64) * DP
    begin, end = _class_number(first, last, k, n, least)
    if (begin < n) | (k == classes):
        back = tl.load(total + within)
        active = _load_matrix(others_high, others_low, others_scale, k, rows, DP, SPLIT)
        if k < classes:
            p, q = _class_weights(end - begin, n)
            own = _load_matrix(own_high, own_low, own_scale, k, rows, DP, SPLIT)
            weighted = _add_slots(slots, k, begin, end, run, within, DP * DP)
            back = sigma * (back - q.to(tl.float64) * weighted) - p * weighted
            active = sigma * q * active - p * own
            if UNIFORM:
                active += back.to(tl.float32)
        else:
            back *= sigma
            active *= sigma
        back = 2 * back.to(tl.float32)
        _store_matrix(2 * active, active_high, active_low, active_scale, at_row, rows, DP, SPLIT)
        _store_matrix(back, back_high, back_low, back_scale, at_row, rows, DP, SPLIT)


@triton.jit
def _load_square(high, low, number, DP: tl.constexpr, SPLIT: tl.constexpr):
    """The matrix of that number, in two parts, transposed."""
    c = tl.arange(0, DP)
    at = number.to(tl.int64) * DP * DP
    uh, ul = _load_rows(high + at, low + at, c, c < DP, c, DP, SPLIT)
    return tl.trans(uh), tl.trans(ul)


@triton.jit
def _times_part(
    row_high, row_low, r, mask, high, low, number,
    DP: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """(M u) but for the scale of M's rows, [rows, DP], where M does not fit as a whole."""
    c = tl.arange(0, DP)
    at = number.to(tl.int64) * DP * DP
    y = tl.zeros((r.shape[0], DP), tl.float32)
    for start in range(0, DP, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        uh, ul = _load_rows(row_high, row_low, r, mask, k, DP, SPLIT)
        mh, ml = _load_rows(high + at, low + at, c, c < DP, k, DP, SPLIT)
        y += _product(uh, ul, tl.trans(mh), tl.trans(ml), SPLIT)
    return y


@triton.jit
def _store_means(
    own, others, squared, members, r, inside, order, active, positive, negative, losses,
    n, margin, sigma, BY_ROW: tl.constexpr,
):  # fmt: skip
    """Both means of rows from their forms, and whether they are active; their losses, [rows]."""
    p, q = _class_weights(members, n)
    positive_mean = p * (own - squared * squared)
    negative_mean = q * others
    i = tl.load(order + r, mask=inside, other=0)
    tl.store(positive + i, positive_mean, mask=inside)
    tl.store(negative + i, negative_mean, mask=inside)
    hinge = margin - positive_mean + sigma * negative_mean
    is_inactive = hinge <= 0  # false for NaN, which counts as active
    is_active = tl.where(is_inactive, 0, 1).to(tl.uint8)
    loss = tl.where(is_inactive | (inside == 0), 0.0, hinge)
    if BY_ROW:
        tl.store(active + i, is_active, mask=inside)
        tl.store(losses + i, loss, mask=inside)
    else:
        tl.store(active + r, is_active, mask=inside)
    return loss


@triton.jit(do_not_specialize=["n", "run", "least", "classes"])
def row_means(
    high,
    low,
    order,
    first,
    last,
    small_rows,
    in_band,
    own_high,
    own_low,
    own_scale,
    others_high,
    others_low,
    others_scale,
    active,
    positive,
    negative,
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

    What small rows have from their own class is in `in_band`. active: whether h_i > 0, in class
    order; losses[p]: the sum over the run of max(0, h_i), times `scale`. BY_ROW: active and losses
    are of each row, in the given order. 12 D^2 FLOPs a row (4 D^2 without SPLIT), half of that for
    small rows.
    """
    begin, end = _run(run, n)
    c = tl.arange(0, DP)
    margin_ = tl.full((), margin, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    done = begin
    for t in range(_probes(begin, end, least)):
        c_first, c_last, number = _probe(first, last, t, begin, end, least)
        start, stop = tl.maximum(begin, c_first), tl.minimum(end, c_last)
        members = c_last - c_first
        if (members >= least) & (stop > done):
            done = stop
            t_scale = tl.load(own_scale + number.to(tl.int64) * DP + c)
            x_scale = tl.load(others_scale + number.to(tl.int64) * DP + c)
            if DP == BLOCK_K:
                th, tl_ = _load_square(own_high, own_low, number, DP, SPLIT)
                xh, xl = _load_square(others_high, others_low, number, DP, SPLIT)
            for at in range(start, stop, BLOCK):
                r = at + tl.arange(0, BLOCK)
                inside = r < stop
                uh, ul = _load_rows(high, low, r, inside, c, DP, SPLIT)
                if DP == BLOCK_K:
                    own = _product(uh, ul, th, tl_, SPLIT)
                    others = _product(uh, ul, xh, xl, SPLIT)
                else:
                    own = _times_part(
                        high, low, r, inside, own_high, own_low, number, DP, BLOCK_K, SPLIT
                    )
                    others = _times_part(
                        high, low, r, inside, others_high, others_low, number, DP, BLOCK_K, SPLIT
                    )
                u = _whole(uh, ul, SPLIT) * (1 / UNIT)
                own_form = tl.sum(own * t_scale[None, :] * u, axis=1)
                others_form = tl.sum(others * x_scale[None, :] * u, axis=1)
                total += _store_means(
                    own_form, others_form, tl.sum(u * u, axis=1), members, r, inside, order, active,
                    positive, negative, losses, n, margin_, sigma, BY_ROW,
                )  # fmt: skip
    if tl.load(small_rows + tl.program_id(0)) > 0:
        x_scale = tl.load(others_scale + classes.to(tl.int64) * DP + c)
        if DP == BLOCK_K:
            xh, xl = _load_square(others_high, others_low, classes, DP, SPLIT)
        for at in range(begin, end, BLOCK):
            r = at + tl.arange(0, BLOCK)
            inside = r < end
            members = _members(first, last, r, inside)
            inside = inside & (members < least)
            if tl.max(inside.to(tl.int32), axis=0) > 0:
                uh, ul = _load_rows(high, low, r, inside, c, DP, SPLIT)
                if DP == BLOCK_K:
                    others = _product(uh, ul, xh, xl, SPLIT)
                else:
                    others = _times_part(
                        high, low, r, inside, others_high, others_low, classes, DP, BLOCK_K, SPLIT
                    )
                u = _whole(uh, ul, SPLIT) * (1 / UNIT)
                squared = tl.sum(u * u, axis=1)
                own_form = tl.load(in_band + r, mask=inside, other=0.0) + squared * squared
                others_form = tl.sum(others * x_scale[None, :] * u, axis=1) - own_form
                total += _store_means(
                    own_form, others_form, squared, members, r, inside, order, active,
                    positive, negative, losses, n, margin_, sigma, BY_ROW,
                )  # fmt: skip
    if not BY_ROW:
        tl.store(losses + tl.program_id(0), tl.sum(total, axis=0) * tl.full((), scale, tl.float32))


@triton.jit
def _band(first, last, r, inside, least, n):
    """Which rows have others in a small class, and the rows [begin, end) of these classes."""
    c_first = tl.load(first + r, mask=inside, other=0)
    c_last = tl.load(last + r, mask=inside, other=0)
    small = inside & (c_last - c_first < least) & (c_last - c_first > 1)
    begin = tl.min(tl.where(small, c_first, n), axis=0)
    end = tl.max(tl.where(small, c_last, 0), axis=0)
    return small, c_first, begin, end


@triton.jit
def _band_similarity(
    high, low, i, own, j, others, DP: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr
):
    """s_ij of two blocks of rows."""
    s = tl.zeros((i.shape[0], j.shape[0]), tl.float32)
    for start in range(0, DP, BLOCK_D):
        c = start + tl.arange(0, BLOCK_D)
        uh, ul = _load_rows(high, low, i, own, c, DP, SPLIT)
        g, m = _load_rows(high, low, j, others, c, DP, SPLIT)
        s += _product(uh, ul, tl.trans(g), tl.trans(m), SPLIT)
    return s * (1 / (UNIT * UNIT))


@triton.jit(do_not_specialize=["n", "run", "least"])
def band_sums(
    high,
    low,
    first,
    last,
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
    """The sum of s_ij^2 over a small row's own class, itself left out.

    Program (p, s) has every num_programs(1)-th block of the p-th run; it ends at once without any.
    """
    begin, end = _run(run, n)
    if tl.load(small_rows + tl.program_id(0)) == 0:
        end = begin
    for block in range(begin + tl.program_id(1) * BLOCK, end, tl.num_programs(1) * BLOCK):
        r = block + tl.arange(0, BLOCK)
        small, c_first, near, far = _band(first, last, r, r < end, least, n)
        total = tl.zeros((BLOCK,), tl.float32)
        for at in range(near, far, BLOCK):
            j = at + tl.arange(0, BLOCK)
            inside = j < far
            s = _band_similarity(high, low, r, small, j, inside, DP, BLOCK_D, SPLIT)
            pair = c_first[:, None] == tl.load(first + j, mask=inside, other=-1)[None, :]
            pair = pair & small[:, None]
            if columns_before is None:
                pair = pair & (r[:, None] != j[None, :])
            else:
                pair = pair & _is_column(columns_before, j, inside)[None, :]
            total += tl.sum(tl.where(pair, s * s, 0.0), axis=1)
        tl.store(in_band + r, total, mask=r < end)


@triton.jit(do_not_specialize=["n", "run", "least", "stride"])
def band_gradient(
    high,
    low,
    order,
    first,
    last,
    small_rows,
    weights,
    largest,
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
    """What a small row's own class adds to dL/du_i, over the largest weight, into its gradient.

    -2 (p + sigma q) sum_j (w_i + w_j) s_ij u_j. Program (p, s, t) has BLOCK_V columns of every
    num_programs(1)-th block of the p-th run; it ends at once without small rows.
    """
    begin, end = _run(run, n)
    if tl.load(small_rows + tl.program_id(0)) == 0:
        end = begin
    k = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    for block in range(begin + tl.program_id(1) * BLOCK, end, tl.num_programs(1) * BLOCK):
        r = block + tl.arange(0, BLOCK)
        small, c_first, near, far = _band(first, last, r, r < end, least, n)
        if near < far:
            w_i = _weight(weights, largest, order, r, small, UNIFORM)
            v = tl.zeros((BLOCK, BLOCK_V), tl.float32)
            for at in range(near, far, BLOCK):
                j = at + tl.arange(0, BLOCK)
                inside = j < far
                s = _band_similarity(high, low, r, small, j, inside, DP, BLOCK_D, SPLIT)
                pair = c_first[:, None] == tl.load(first + j, mask=inside, other=-1)[None, :]
                pair = pair & (r[:, None] != j[None, :]) & small[:, None]
                w_j = _weight(weights, largest, order, j, inside, UNIFORM)
                weight = tl.where(pair, s * (w_i[:, None] + w_j[None, :]), 0.0)
                wh, wl = _split(weight * (UNIT / 2))
                uh, ul = _load_rows(high, low, j, inside, k, DP, SPLIT)
                v += _product(wh, wl, uh, ul, SPLIT)
            p, q = _class_weights(_members(first, last, r, small), n)
            v *= ((p + sigma * q) * (-4 / (UNIT * UNIT)))[:, None]
            i = tl.load(order + r, mask=small, other=0)
            out = gradient + i[:, None] * stride + k[None, :]
            tl.store(out, v, mask=small[:, None] & (k < d)[None, :])


@triton.jit
def _store_gradient(v, uh, ul, r, out, mask, written, inverse, factor, SPLIT: tl.constexpr):
    """dL/df = (v - (v . u) u) / |f|, times `factor`."""
    u = _whole(uh, ul, SPLIT) * (1 / UNIT)
    v -= tl.sum(v * u, axis=1)[:, None] * u
    v *= tl.load(inverse + r, mask=mask, other=0.0)[:, None]
    v = tl.where(v == 0, 0.0, v * factor)  # an infinite upstream of rows that are all inactive
    tl.store(out, v, mask=written)


@triton.jit(do_not_specialize=["n", "run", "least", "classes", "stride"])
def row_gradients(
    high,
    low,
    order,
    first,
    last,
    small_rows,
    inverse,
    weights,
    largest,
    active_high,
    active_low,
    active_scale,
    back_high,
    back_low,
    back_scale,
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
    """dL/df of a run of rows, in the given order, by v = dL/du = w K u + B u over the largest w.

    `gradient` holds what `band_gradient` found for small rows. Two products, 12 D^2 FLOPs a row
    (4 D^2 without SPLIT), or one where UNIFORM and all of a class's rows in the run are active.
    Reads and writes a row once where matrices are held as a whole.
    """
    # of rows beside two whole matrices, for which shared memory has less room
    FEWER: tl.constexpr = BLOCK // 2 if DP == BLOCK_K else BLOCK
    begin, end = _run(run, n)
    c = tl.arange(0, DP)
    factor = (tl.load(largest) * scale).to(tl.float32)
    small = tl.load(small_rows + tl.program_id(0)) > 0
    probes = _probes(begin, end, least)
    done = begin
    for t in range(probes + 1):
        c_first, c_last, number = _probe(first, last, t, begin, end, least)
        start, stop = tl.maximum(begin, c_first), tl.minimum(end, c_last)
        of_small = t == probes
        wanted = (c_last - c_first >= least) & (stop > done)
        if of_small:
            number, start, stop, wanted = classes, begin, end, small
        if wanted:
            done = stop
            k_scale = tl.load(active_scale + number.to(tl.int64) * DP + c)
            if DP == BLOCK_K:
                kh, kl = _load_square(active_high, active_low, number, DP, SPLIT)
            n_inactive = 1
            if UNIFORM:
                counted = tl.zeros((512,), tl.int32)
                for at in range(start, stop, 512):
                    r = at + tl.arange(0, 512)
                    counted += (tl.load(weights + r, mask=r < stop, other=1) == 0).to(tl.int32)
                n_inactive = tl.sum(counted, axis=0)
            if (n_inactive == 0) & (of_small == 0):
                for at in range(start, stop, BLOCK):
                    r = at + tl.arange(0, BLOCK)
                    inside = r < stop
                    uh, ul = _load_rows(high, low, r, inside, c, DP, SPLIT)
                    if DP == BLOCK_K:
                        v = _product(uh, ul, kh, kl, SPLIT)
                    else:
                        v = _times_part(
                            high,
                            low,
                            r,
                            inside,
                            active_high,
                            active_low,
                            number,
                            DP,
                            BLOCK_K,
                            SPLIT,
                        )
                    i = tl.load(order + r, mask=inside, other=0)
                    out = gradient + i[:, None] * stride + c[None, :]
                    written = inside[:, None] & (c < d)[None, :]
                    _store_gradient(
                        v * k_scale[None, :],
                        uh,
                        ul,
                        r,
                        out,
                        inside,
                        written,
                        inverse,
                        factor,
                        SPLIT,
                    )
            else:
                b_scale = tl.load(back_scale + number.to(tl.int64) * DP + c)
                if DP == BLOCK_K:
                    bh, bl = _load_square(back_high, back_low, number, DP, SPLIT)
                for at in range(start, stop, FEWER):
                    r = at + tl.arange(0, FEWER)
                    inside = r < stop
                    members = _members(first, last, r, inside)
                    inside = inside & ((members < least) | (of_small == 0))
                    uh, ul = _load_rows(high, low, r, inside, c, DP, SPLIT)
                    w = _weight(weights, largest, order, r, inside, UNIFORM)
                    if DP == BLOCK_K:
                        v = _product(uh, ul, kh, kl, SPLIT) * k_scale[None, :]
                        b = _product(uh, ul, bh, bl, SPLIT) * b_scale[None, :]
                    else:
                        v = k_scale[None, :] * _times_part(
                            high,
                            low,
                            r,
                            inside,
                            active_high,
                            active_low,
                            number,
                            DP,
                            BLOCK_K,
                            SPLIT,
                        )
                        b = b_scale[None, :] * _times_part(
                            high, low, r, inside, back_high, back_low, number, DP, BLOCK_K, SPLIT
                        )
                    i = tl.load(order + r, mask=inside, other=0)
                    out = gradient + i[:, None] * stride + c[None, :]
                    written = inside[:, None] & (c < d)[None, :]
                    if of_small:
                        w *= _class_weights(members, n)[1]
                        b += tl.load(out, mask=written & (members > 1)[:, None], other=0.0)
                        v = v * w[:, None] + b
                    elif UNIFORM:
                        v = tl.where((w != 0)[:, None], v, b)
                    else:
                        v = v * w[:, None] + b
                    _store_gradient(v, uh, ul, r, out, inside, written, inverse, factor, SPLIT)
