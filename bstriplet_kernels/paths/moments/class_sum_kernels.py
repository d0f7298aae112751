"""Triton kernels of class sums, which `class_sums_on_gpu` launches. Importing this needs triton.

Rows are walked in class order, and read from where they lie through `order`. All kernels are bound
by memory. Each program has a run of consecutive rows, so that a class is in one run or in several
that follow each other. A class's sum stands in a table at the class's first row: no class numbers
are needed.

One class, the middle one, is that of the middle column in class order. A class with more than half
of the columns is the middle one. The total is kept with and without it, so that "all others" never
is a small difference of large numbers.

Arguments that belong together are a tuple, which `class_sums_on_gpu` describes: `rows`, `columns`
and `side` are a `ClassOrder`, `weights` a `Weights`, `sums` a `Sums`. Without ref_emb the columns
are the rows. Sizes are arguments of their own: Triton specialises on numbers in a tuple whatever
`do_not_specialize` says.
"""

# Triton's tuples grow, and only by a sum: it knows no starred items.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated"

import triton
import triton.language as tl

from .kernels import _bounds, _class_weights, _hinge, _load_embeddings, _norm, _over


@triton.jit
def _row_weights(members, m, OWN: tl.constexpr, DTYPE: tl.constexpr):
    """p and q of a row whose class has so many of the m columns; OWN: it is one of them itself."""
    if OWN:
        return _class_weights(members, m, DTYPE)
    else:
        return _class_weights(members + 1, m + 1, DTYPE)


@triton.jit
def _middle(first, last, m):
    """The first row of the middle class; -1 where it has no row on this side.

    first, last: for each column, where its class begins and ends on this side.
    """
    begin = tl.load(first + m // 2)
    return tl.where(begin < tl.load(last + m // 2), begin, -1)


@triton.jit
def _upstream(weights, i, r, mask, stride, scale):
    """a_i of row i, which is row r in class order."""
    is_active = tl.load(weights.is_active + r, mask=mask, other=0) != 0
    upstream = tl.load(weights.upstream + i * stride, mask=mask, other=0.0)
    # not a product: an infinite upstream times 0 would be NaN
    return tl.where(is_active, upstream * tl.full((), scale, upstream.dtype), 0.0)


@triton.jit
def _load_sums(table, first, exists, k, d):
    """Columns k of the sums of classes that begin at row `first`; 0 for one without rows."""
    at = table + first[:, None].to(tl.int64) * d + k[None, :]
    return tl.load(at, mask=exists[:, None] & (k < d)[None, :], other=0.0)


@triton.jit
def _sum_of_others(total, own, is_middle, k, d):
    """For each row the total of all classes but its own; own: what its class added, [rows, k]."""
    rest = tl.load(total + k, mask=k < d, other=0.0)[None, :]
    every = tl.load(total + d + k, mask=k < d, other=0.0)[None, :]
    return tl.where(is_middle[:, None], rest, every - own)


@triton.jit
def _find_norms(
    r, embeddings, side, n, d, stride_n, stride_d, squared_eps, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Store 1 / norm of rows r."""
    DTYPE: tl.constexpr = side.inverse.dtype.element_ty
    inside = r < n
    i = tl.load(side.order + r, mask=inside, other=0)
    squared = tl.zeros(r.shape, DTYPE)
    for start in range(0, d, BLOCK_D):
        k = start + tl.arange(0, BLOCK_D)
        f = _load_embeddings(embeddings, i, inside, k, d, stride_n, stride_d, DTYPE)
        squared += tl.sum(f * f, axis=1)
    inverse = _over(1.0, _norm(squared, tl.full((), squared_eps, DTYPE)))
    tl.store(side.inverse + r, inverse, mask=inside)


@triton.jit
def _find_classes(
    program, embeddings, side, labels, other_labels, n, m, d, stride_n, stride_d, squared_eps,
    steps, BLOCK: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, NORMS: tl.constexpr,
):  # fmt: skip
    """Of BLOCK rows of a side: see `find_classes`."""
    r = program * BLOCK + tl.arange(0, BLOCK)
    inside = r < n
    label = tl.load(labels + r, mask=inside, other=0)
    first, last = _bounds(labels, label, inside, n, steps)
    tl.store(side.first + r, first, mask=inside)
    tl.store(side.last + r, last, mask=inside)
    if other_labels is not None:
        first, last = _bounds(other_labels, label, inside, m, steps)
        tl.store(side.other_first + r, first, mask=inside)
        tl.store(side.other_last + r, last, mask=inside)
    if NORMS:
        for at in range(0, BLOCK, ROWS):
            _find_norms(
                program * BLOCK + at + tl.arange(0, ROWS), embeddings, side, n, d,
                stride_n, stride_d, squared_eps, BLOCK_D,
            )  # fmt: skip


@triton.jit(do_not_specialize=["n", "m", "steps"])
def find_classes(
    embeddings,
    ref_emb,
    rows,
    columns,
    labels,
    ref_labels,
    n,
    m,
    d,
    stride_n,
    stride_d,
    ref_stride_n,
    ref_stride_d,
    squared_eps: tl.float64,
    steps,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NORMS: tl.constexpr,
):
    """Where the class of each row begins and ends on its own side and on the other.

    Labels are sorted. The programs of the columns follow those of the rows, where there is a
    ref_emb. With NORMS also 1 / norm, for which each number is read once.
    """
    program = tl.program_id(0)
    of_rows = tl.cdiv(n, BLOCK)
    if ref_emb is None:
        _find_classes(
            program, embeddings, rows, labels, None, n, m, d, stride_n, stride_d, squared_eps,
            steps, BLOCK, ROWS, BLOCK_D, NORMS,
        )  # fmt: skip
    elif program < of_rows:
        _find_classes(
            program, embeddings, rows, labels, ref_labels, n, m, d, stride_n, stride_d,
            squared_eps, steps, BLOCK, ROWS, BLOCK_D, NORMS,
        )  # fmt: skip
    else:
        _find_classes(
            program - of_rows, ref_emb, columns, ref_labels, labels, m, n, d, ref_stride_n,
            ref_stride_d, squared_eps, steps, BLOCK, ROWS, BLOCK_D, NORMS,
        )  # fmt: skip


@triton.jit
def _in_total(rounded, side, r, mask, m, BY_Q: tl.constexpr):
    """What a class's rounded sum adds to the total; BY_Q: times q_c."""
    counted = rounded.to(tl.float64)
    if BY_Q:
        first = tl.load(side.other_first + r, mask=mask, other=0)
        members = tl.load(side.other_last + r, mask=mask, other=0) - first
        counted *= _class_weights(members, m, rounded.dtype)[1].to(tl.float64)
    return counted


@triton.jit(do_not_specialize=["n", "m", "run", "upstream_stride"])
def class_sums(
    embeddings,
    side,
    weights,
    middle_first,
    middle_last,
    table,
    sums,
    n,
    m,
    run,
    d,
    stride_n,
    stride_d,
    upstream_stride,
    squared_eps: tl.float64,
    scale: tl.float64,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NORMS: tl.constexpr,
):
    """Sums over classes of the n unit rows of a side, weighted where weights are given.

    Program (p, t) walks the p-th run and has its t-th BLOCK_D columns. A class that lies in the run
    goes to the table. What the run has of other classes goes to partials[p]: first that of the
    class that began before, second that of the class that goes on. totals[p] is the sum over the
    classes that lie in the run, without the middle one; with weights each counts there times q_c.
    Sums are in float64. With NORMS the program finds 1 / norm too; it then has all columns.

    ROWS rows are read at once, then added one after another. Each thread adds its own columns and,
    unlike in a scan, waits for no other; with NORMS they meet once a row, for the norm. A class
    costs a branch and a store where it ends. Reads each number once.
    """
    DTYPE: tl.constexpr = table.dtype.element_ty
    p = tl.program_id(0)
    begin = p * run
    end = tl.minimum(begin + run, n)
    k = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = k < d
    middle = _middle(middle_first, middle_last, m)
    acc = tl.zeros((BLOCK_D,), tl.float64)
    total = tl.zeros((BLOCK_D,), tl.float64)
    for at in range(begin, end, ROWS):
        # loads come first, as the compiler moves none across a store
        numbers, factors, firsts, lasts = (), (), (), ()
        for s in tl.static_range(ROWS):
            r = at + s
            mask = r < end
            i = tl.load(side.order + r, mask=mask, other=0)
            address = embeddings + i * stride_n + k.to(tl.int64) * stride_d
            f = tl.load(address, mask=inside & mask, other=0.0).to(DTYPE)
            numbers = numbers + (f,)
            firsts = firsts + (tl.load(side.first + r, mask=mask, other=0),)
            lasts = lasts + (tl.load(side.last + r, mask=mask, other=0),)
            if weights is not None:
                factors = factors + (_upstream(weights, i, r, mask, upstream_stride, scale),)
        units = ()
        for s in tl.static_range(ROWS):
            r, f = at + s, numbers[s]
            if NORMS:
                norm = _norm(tl.sum(f * f, axis=0), tl.full((), squared_eps, DTYPE))
                inverse = _over(1.0, norm)
                tl.store(side.inverse + r, inverse, mask=r < end)
            else:
                inverse = tl.load(side.inverse + r, mask=r < end, other=0.0)
            units = units + (f * inverse,)
        for s in tl.static_range(ROWS):
            r, first, last = at + s, firsts[s], lasts[s]
            addend = units[s].to(tl.float64)
            if weights is not None:
                addend *= factors[s].to(tl.float64)
            acc = tl.where(r == first, 0.0, acc) + addend
            if (r < end) & ((r + 1 == last) | (r + 1 == end)):
                if first < begin:
                    tl.store(sums.partials + (2 * p).to(tl.int64) * d + k, acc, mask=inside)
                elif r + 1 < last:
                    tl.store(sums.partials + (2 * p + 1).to(tl.int64) * d + k, acc, mask=inside)
                else:
                    rounded = acc.to(DTYPE)
                    tl.store(table + first.to(tl.int64) * d + k, rounded, mask=inside)
                    if first != middle:
                        total += _in_total(rounded, side, r, True, m, weights is not None)
    tl.store(sums.totals + p.to(tl.int64) * d + k, total, mask=inside)


@triton.jit(do_not_specialize=["n", "m", "run"])
def add_class_parts(
    side,
    middle_first,
    middle_last,
    table,
    sums,
    n,
    m,
    run,
    d,
    BY_Q: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The sum of a class in several runs, in a fixed order, to the table and to totals.

    Program (p, t) has BLOCK columns of the class that begins in the p-th run and goes on. It ends
    at once where there is none.
    """
    p = tl.program_id(0)
    end = tl.minimum((p + 1) * run, n)
    first, last = tl.load(side.first + end - 1), tl.load(side.last + end - 1)
    if (first >= p * run) & (last > end):
        k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        depth = tl.arange(0, DEPTH)
        acc = tl.zeros((DEPTH, BLOCK), tl.float64)
        stop = (last - 1) // run + 1
        for start in range(p + 1, stop, DEPTH):
            q = start + depth
            at = sums.partials + (2 * q)[:, None].to(tl.int64) * d + k[None, :]
            acc += tl.load(at, mask=(q < stop)[:, None] & (k < d)[None, :], other=0.0)
        begun = sums.partials + (2 * p + 1).to(tl.int64) * d + k
        acc = tl.load(begun, mask=k < d, other=0.0) + tl.sum(acc, axis=0)
        rounded = acc.to(table.dtype.element_ty)
        tl.store(table + first.to(tl.int64) * d + k, rounded, mask=k < d)
        if first != _middle(middle_first, middle_last, m):
            total = sums.totals + p.to(tl.int64) * d + k
            counted = _in_total(rounded, side, end - 1, True, m, BY_Q)
            tl.store(total, tl.load(total, mask=k < d, other=0.0) + counted, mask=k < d)


@triton.jit(do_not_specialize=["m", "runs"])
def add_class_totals(
    sums,
    columns,
    middle_first,
    middle_last,
    table,
    total,
    m,
    runs,
    d,
    BY_Q: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The sum of `totals`, in a fixed order; then the same with the middle class: total, [2, D]."""
    DTYPE: tl.constexpr = table.dtype.element_ty
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    depth = tl.arange(0, DEPTH)
    acc = tl.zeros((DEPTH, BLOCK), tl.float64)
    for start in range(0, runs, DEPTH):
        q = start + depth
        at = sums.totals + q[:, None].to(tl.int64) * d + k[None, :]
        acc += tl.load(at, mask=(q < runs)[:, None] & (k < d)[None, :], other=0.0)
    rest = tl.sum(acc, axis=0)
    first = _middle(middle_first, middle_last, m)
    at = table + first.to(tl.int64) * d + k
    of_middle = tl.load(at, mask=(k < d) & (first >= 0), other=0.0).to(tl.float64)
    if BY_Q:
        members = tl.load(columns.last + m // 2) - tl.load(columns.first + m // 2)
        of_middle *= _class_weights(members, m, DTYPE)[1].to(tl.float64)
    tl.store(total + k, rest.to(DTYPE), mask=k < d)
    tl.store(total + d + k, (rest + of_middle).to(DTYPE), mask=k < d)


@triton.jit(do_not_specialize=["n", "m", "run"])
def linear_means(
    embeddings,
    rows,
    columns,
    table,
    total,
    is_active,
    means,
    losses,
    n,
    m,
    run,
    d,
    stride_n,
    stride_d,
    margin: tl.float64,
    sigma,
    scale: tl.float64,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OWN: tl.constexpr,
    BY_ROW: tl.constexpr,
):
    """Eq. 3's two means of a run of rows, in the given order, by two products of vectors each.

    is_active: whether h_i > 0, in class order. losses[p]: the sum over the run of max(0, h_i),
    times `scale`; BY_ROW: one a row, in the given order, without `scale`. OWN: the columns are the
    rows. Reads each number once, and a class's sum for each of its rows.
    """
    DTYPE: tl.constexpr = table.dtype.element_ty
    begin = tl.program_id(0) * run
    end = tl.minimum(begin + run, n)
    middle = _middle(columns.first, columns.last, m)
    summed = tl.zeros((ROWS,), DTYPE)
    for at in range(begin, end, ROWS):
        r = at + tl.arange(0, ROWS)
        inside = r < end
        i = tl.load(rows.order + r, mask=inside, other=0)
        inverse = tl.load(rows.inverse + r, mask=inside, other=0.0)[:, None]
        first = tl.load(rows.other_first + r, mask=inside, other=0)
        members = tl.load(rows.other_last + r, mask=inside, other=0) - first
        is_middle = (first == middle) & (members > 0)
        positive = tl.zeros((ROWS,), DTYPE)
        negative = tl.zeros((ROWS,), DTYPE)
        for start in range(0, d, BLOCK_D):
            k = start + tl.arange(0, BLOCK_D)
            u = _load_embeddings(embeddings, i, inside, k, d, stride_n, stride_d, DTYPE) * inverse
            own = _load_sums(table, first, members > 0, k, d)
            others = _sum_of_others(total, own, is_middle, k, d)
            if OWN:  # after the product it would cancel digits
                own -= u
            positive += tl.sum(own * u, axis=1)
            negative += tl.sum(others * u, axis=1)
        p, q = _row_weights(members, m, OWN, DTYPE)
        margin_ = tl.full((), margin, DTYPE)
        loss, flag = _hinge(p * positive, q * negative, means, i, inside, margin_, sigma)
        tl.store(is_active + r, flag, mask=inside)
        summed += loss
        if BY_ROW:
            tl.store(losses + i, loss, mask=inside)
    if not BY_ROW:
        tl.store(losses + tl.program_id(0), tl.sum(summed, axis=0) * tl.full((), scale, DTYPE))


@triton.jit
def _gradient_parts(
    f, inverse, a, p, q, sigma, k, d, is_middle, of_columns, of_rows, table, total, back,
    back_total, ROW: tl.constexpr, COLUMN: tl.constexpr,
):  # fmt: skip
    """v and u of a block of rows: see `linear_gradients`. of_columns, of_rows: (first row of the
    class, whether it has any) on either side.
    """
    u = f * inverse[:, None]
    v = tl.zeros(u.shape, u.dtype)
    if ROW:
        own = _load_sums(table, of_columns[0], of_columns[1], k, d)
        others = _sum_of_others(total, own, is_middle, k, d)
        v += a[:, None] * ((sigma * q)[:, None] * others - p[:, None] * own)
    if COLUMN:
        own = _load_sums(back, of_rows[0], of_rows[1], k, d)
        others = _sum_of_others(back_total, q[:, None] * own, is_middle, k, d)
        v += sigma * others - p[:, None] * own
    return v, u


@triton.jit
def _store_projected(v, u, along, inverse, out, inside, k, d):
    """Store dL/df = (v - (v . u) u) / |f|; along = v . u."""
    v = (v - along[:, None] * u) * inverse[:, None]
    tl.store(out + k[None, :], v, mask=inside[:, None] & (k < d)[None, :])


@triton.jit
def _linear_gradients(
    program, embeddings, side, columns, weights, table, total, back, back_total, gradient, n, m,
    run, d, stride_n, stride_d, upstream_stride, sigma, scale, ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr, WHOLE: tl.constexpr, ROW: tl.constexpr, COLUMN: tl.constexpr,
):  # fmt: skip
    """Of a run of a side that are rows, columns or both: see `linear_gradients`."""
    DTYPE: tl.constexpr = table.dtype.element_ty
    begin = program * run
    end = tl.minimum(begin + run, n)
    middle = _middle(columns.first, columns.last, m)
    for at in range(begin, end, ROWS):
        r = at + tl.arange(0, ROWS)
        inside = r < end
        i = tl.load(side.order + r, mask=inside, other=0)
        inverse = tl.load(side.inverse + r, mask=inside, other=0.0)
        first = tl.load(side.first + r, mask=inside, other=0)
        last = tl.load(side.last + r, mask=inside, other=0)
        other_first = tl.load(side.other_first + r, mask=inside, other=0)
        other_last = tl.load(side.other_last + r, mask=inside, other=0)
        a = inverse  # not used for columns
        if ROW:
            a = _upstream(weights, i, r, inside, upstream_stride, scale)
            members = other_last - other_first
            of_columns, of_rows = (other_first, members > 0), (first, last > first)
        else:
            members = last - first
            of_columns, of_rows = (first, members > 0), (other_first, other_last > other_first)
        is_middle = (of_columns[0] == middle) & (members > 0)
        p, q = _row_weights(members, m, ROW and COLUMN, DTYPE)
        out = gradient + i[:, None] * d
        along = tl.zeros((ROWS,), DTYPE)
        for start in range(0, d, BLOCK_D):
            k = start + tl.arange(0, BLOCK_D)
            f = _load_embeddings(embeddings, i, inside, k, d, stride_n, stride_d, DTYPE)
            v, u = _gradient_parts(
                f, inverse, a, p, q, sigma, k, d, is_middle, of_columns, of_rows, table, total,
                back, back_total, ROW, COLUMN,
            )  # fmt: skip
            along += tl.sum(v * u, axis=1)
            if WHOLE:
                _store_projected(v, u, along, inverse, out, inside, k, d)
        if not WHOLE:
            for start in range(0, d, BLOCK_D):
                k = start + tl.arange(0, BLOCK_D)
                f = _load_embeddings(embeddings, i, inside, k, d, stride_n, stride_d, DTYPE)
                v, u = _gradient_parts(
                    f, inverse, a, p, q, sigma, k, d, is_middle, of_columns, of_rows, table,
                    total, back, back_total, ROW, COLUMN,
                )  # fmt: skip
                _store_projected(v, u, along, inverse, out, inside, k, d)


@triton.jit(do_not_specialize=["n", "m", "run", "upstream_stride"])
def linear_gradients(
    embeddings,
    ref_emb,
    rows,
    columns,
    weights,
    table,
    total,
    back,
    back_total,
    gradient,
    ref_gradient,
    n,
    m,
    run,
    d,
    stride_n,
    stride_d,
    ref_stride_n,
    ref_stride_d,
    upstream_stride,
    sigma,
    scale: tl.float64,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """dL/df = (v - (v . u) u) / |f| with v = a K + B, of a run of rows, in the given order.

    K = sigma q (m - m_c) - p m_c comes from table and total, B = sigma (b - q b_c) - p b_c from
    back and back_total. With ref_emb v is a K for a row, and B for a column; the programs of the
    columns follow those of the rows. Reads and writes each number once where WHOLE, which means
    D <= BLOCK_D; else reads it twice.
    """
    program = tl.program_id(0)
    of_rows = tl.cdiv(n, run)
    if ref_emb is None:
        _linear_gradients(
            program, embeddings, rows, columns, weights, table, total, back, back_total, gradient,
            n, m, run, d, stride_n, stride_d, upstream_stride, sigma, scale, ROWS, BLOCK_D, WHOLE,
            True, True,
        )  # fmt: skip
    elif program < of_rows:
        _linear_gradients(
            program, embeddings, rows, columns, weights, table, total, back, back_total, gradient,
            n, m, run, d, stride_n, stride_d, upstream_stride, sigma, scale, ROWS, BLOCK_D, WHOLE,
            True, False,
        )  # fmt: skip
    else:
        _linear_gradients(
            program - of_rows, ref_emb, columns, columns, weights, table, total, back, back_total,
            ref_gradient, m, m, run, d, ref_stride_n, ref_stride_d, upstream_stride, sigma, scale,
            ROWS, BLOCK_D, WHOLE, False, True,
        )  # fmt: skip
