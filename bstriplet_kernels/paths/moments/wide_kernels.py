"""Kernels of second moments whose matrices no program holds as a whole.

They serve wide embeddings, float64, and joint batches.

Rows, split numbers and class numbers are as in `kernels`, but D' is any multiple of TILE, and
everything is in blocks of columns. Of a symmetric matrix the TILE x TILE blocks on and below the
diagonal are added up, and stored one after another. The complete matrix is stored in parts, as rows
are, and each block of TILE x SCALED numbers shares a scale.

A block of rows is multiplied with the matrices that its rows need, one after another; rows of other
classes are zeros meanwhile. Most blocks need one matrix.

Arguments are as in `kernels`. Where both have a kernel, this one serves joint batches too:
`columns_before` is how many columns stand before each row of one, else None.
"""

import triton
import triton.language as tl

from .kernels import (
    UNIT,
    _add_runs,
    _band,
    _band_similarity,
    _class_number,
    _class_weights,
    _counted,
    _factor,
    _is_column,
    _load_entries,
    _load_rows,
    _members,
    _product,
    _project,
    _run,
    _split,
    _store_means,
    _transposed,
    _weight,
    _whole,
)


@triton.jit
def _block_of(t, DP: tl.constexpr, TILE: tl.constexpr, SCALED: tl.constexpr):
    """Rows and columns of the t-th TILE x SCALED block of a matrix."""
    rows = t // (DP // SCALED) * TILE + tl.arange(0, TILE)
    return rows, t % (DP // SCALED) * SCALED + tl.arange(0, SCALED)


@triton.jit
def _halved(rows, columns, TILE: tl.constexpr):
    """Where `class_moments` stored these numbers of a symmetric matrix."""
    i = tl.maximum(rows[:, None], columns[None, :])
    j = tl.minimum(rows[:, None], columns[None, :])
    part = (i // TILE) * (i // TILE + 1) // 2 + j // TILE
    return part * (TILE * TILE) + i % TILE * TILE + j % TILE


@triton.jit
def _store_scaled(
    block, matrices, number, t,
    DP: tl.constexpr, TILE: tl.constexpr, SCALED: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Store the t-th block of the matrix of that number, times a power of two."""
    r, c = _block_of(t, DP, TILE, SCALED)
    factor = _factor(tl.max(tl.max(tl.abs(block), axis=1), axis=0))
    high, low = _split(block * factor)
    at = number.to(tl.int64) * DP * DP + r[:, None] * DP + c[None, :]
    tl.store(matrices.high + at, high)
    if SPLIT:
        tl.store(matrices.low + at, low)
    tl.store(matrices.scale + number * ((DP // TILE) * (DP // SCALED)) + t, 1 / (factor * UNIT))


@triton.jit
def _load_scaled(
    matrices, number, t,
    DP: tl.constexpr, TILE: tl.constexpr, SCALED: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The t-th block of the matrix of that number, as it was before `_store_scaled`."""
    r, c = _block_of(t, DP, TILE, SCALED)
    parts = _load_entries(matrices, number, r, c, DP, SPLIT)
    scale = tl.load(matrices.scale + number * ((DP // TILE) * (DP // SCALED)) + t)
    return _whole(parts, SPLIT) * (scale * UNIT)


@triton.jit
def _size(DP: tl.constexpr, TILE: tl.constexpr):
    """Numbers of a symmetric matrix in its blocks on and below the diagonal."""
    parts: tl.constexpr = DP // TILE
    return parts * (parts + 1) // 2 * TILE * TILE


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
    TILE: tl.constexpr,
    SCALED: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """T_c and T - T_c of every large class; after the last T - T_c, T: see `kernels`.

    Program (k, t) has the t-th block of the matrices of number k.
    """
    ACC: tl.constexpr = rows.inverse.dtype.element_ty
    k, classes, t = tl.program_id(0), tl.num_programs(0) - 1, tl.program_id(1)
    r, c = _block_of(t, DP, TILE, SCALED)
    within = _halved(r, c, TILE)
    begin, end = _class_number(rows, k, n, least)
    if (begin < n) | (k == classes):
        difference = tl.load(sums.total + within)
        if k < classes:
            moment = _add_runs(sums.slots, k, begin, end, run, within, _size(DP, TILE))
            difference -= moment
            _store_scaled(moment.to(ACC), own, k, t, DP, TILE, SCALED, SPLIT)
        _store_scaled(difference.to(ACC), others, k, t, DP, TILE, SCALED, SPLIT)


@triton.jit(do_not_specialize=["n", "run", "least"])
def gradient_matrices(
    sums,
    rows,
    columns_before,
    own,
    others,
    active,
    back,
    n,
    run,
    least,
    sigma,
    DP: tl.constexpr,
    TILE: tl.constexpr,
    SCALED: tl.constexpr,
    SPLIT: tl.constexpr,
    UNIFORM: tl.constexpr,
):
    """K_c and B_c of every large class, then those of small rows: see `kernels`. K_c + B_c instead
    of K_c where UNIFORM and the rows are the columns.

    Program (k, t) has the t-th block of the matrices of number k.
    """
    ACC: tl.constexpr = rows.inverse.dtype.element_ty
    k, classes, t = tl.program_id(0), tl.num_programs(0) - 1, tl.program_id(1)
    r, c = _block_of(t, DP, TILE, SCALED)
    within = _halved(r, c, TILE)
    begin, end = _class_number(rows, k, n, least)
    if (begin < n) | (k == classes):
        of_all = tl.load(sums.total + within)
        of_active = _load_scaled(others, k, t, DP, TILE, SCALED, SPLIT)
        if k < classes:
            members, all_ = _counted(end - begin, n, columns_before, begin, end, True)
            p, q = _class_weights(members, all_, ACC)
            moment = _load_scaled(own, k, t, DP, TILE, SCALED, SPLIT)
            weighted = _add_runs(sums.slots, k, begin, end, run, within, _size(DP, TILE))
            of_all = sigma * (of_all - q.to(tl.float64) * weighted) - p * weighted
            of_active = sigma * q * of_active - p * moment
            if UNIFORM and columns_before is None:
                of_active += of_all.to(ACC)
        else:
            of_all *= sigma
            of_active *= sigma
        of_all = 2 * of_all.to(ACC)
        _store_scaled(2 * of_active, active, k, t, DP, TILE, SCALED, SPLIT)
        _store_scaled(of_all, back, k, t, DP, TILE, SCALED, SPLIT)


@triton.jit
def _rows_of(rows, n, least, classes, BLOCK: tl.constexpr):
    """A program's rows, whether they exist, members of their classes, and the number of the
    matrices that they need: `classes` for small rows, classes + 1 for rows that do not exist.
    """
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = r < n
    c_first = tl.load(rows.first + r, mask=inside, other=0)
    members = tl.load(rows.last + r, mask=inside, other=0) - c_first
    number = tl.where(members >= least, tl.cdiv(c_first, least), classes)
    return r, inside, members, tl.where(inside, number, classes + 1)


@triton.jit
def _next(numbers, number, classes):
    """The least of `numbers` above `number`, or classes + 1."""
    return tl.min(tl.where(numbers > number, numbers, classes + 1), axis=0)


@triton.jit
def _times_block(
    rows, r, mask, matrices, number, start, column,
    DP: tl.constexpr, TILE: tl.constexpr, SCALED: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """What BLOCK_K columns of a matrix M add to TILE rows of M u from `start` on, [rows, TILE]."""
    c = start + tl.arange(0, TILE)
    k = column + tl.arange(0, BLOCK_K)
    u = _load_rows(rows, r, mask, k, DP, SPLIT)
    m = _load_entries(matrices, number, c, k, DP, SPLIT)
    block = (number * (DP // TILE) + start // TILE) * (DP // SCALED) + column // SCALED
    return _product(u, _transposed(m), SPLIT) * tl.load(matrices.scale + block)


@triton.jit
def _form(
    rows, r, mask, matrices, number,
    DP: tl.constexpr, TILE: tl.constexpr, SCALED: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """u^T M u of a symmetric M, and |u|^2; numbers below the diagonal blocks count twice."""
    ACC: tl.constexpr = rows.inverse.dtype.element_ty
    form = tl.zeros((r.shape[0],), ACC)
    squared = tl.zeros((r.shape[0],), ACC)
    for start in range(0, DP, TILE):
        c = start + tl.arange(0, TILE)
        y = tl.zeros((r.shape[0], TILE), ACC)
        for column in range(0, start, BLOCK_K):
            y += _times_block(
                rows, r, mask, matrices, number, start, column, DP, TILE, SCALED, BLOCK_K, SPLIT
            )
        y *= 2
        for column in range(start, start + TILE, BLOCK_K):
            y += _times_block(
                rows, r, mask, matrices, number, start, column, DP, TILE, SCALED, BLOCK_K, SPLIT
            )
        u = _whole(_load_rows(rows, r, mask, c, DP, SPLIT), SPLIT) * (1 / UNIT)
        form += tl.sum(y * u, axis=1)
        squared += tl.sum(u * u, axis=1)
    return form, squared


@triton.jit(do_not_specialize=["n", "least", "classes"])
def row_means(
    rows,
    columns_before,
    in_band,
    own,
    others,
    is_active,
    means,
    losses,
    n,
    least,
    classes,
    margin: tl.float64,
    sigma,
    scale: tl.float64,
    DP: tl.constexpr,
    TILE: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    BY_ROW: tl.constexpr,
):
    """Eq. 3's two means of a block of rows, in the given order: see `kernels`.

    losses[p]: the sum over the block. 6 D^2 FLOPs a row (2 D^2 without SPLIT), a little more as
    diagonal blocks are whole; half of that for small rows.
    """
    ACC: tl.constexpr = rows.inverse.dtype.element_ty
    r, inside, members, numbers = _rows_of(rows, n, least, classes, BLOCK)
    begins = tl.load(rows.first + r, mask=inside, other=0)
    members, all_ = _counted(members, n, columns_before, begins, begins + members, inside)
    if columns_before is not None:
        inside = inside & (_is_column(columns_before, r, inside) == 0)
        numbers = tl.where(inside, numbers, classes + 1)
    own_form = tl.zeros((BLOCK,), ACC)
    others_form = tl.zeros((BLOCK,), ACC)
    squared = tl.zeros((BLOCK,), ACC)
    number = tl.min(numbers, axis=0)
    while number <= classes:
        mask = numbers == number
        form, norms = _form(rows, r, mask, others, number, DP, TILE, SCALED, BLOCK_K, SPLIT)
        others_form += form
        squared += norms
        if number < classes:
            form, norms = _form(rows, r, mask, own, number, DP, TILE, SCALED, BLOCK_K, SPLIT)
            own_form += form
        number = _next(numbers, number, classes)
    if columns_before is not None:  # no row is among its columns
        squared = tl.zeros((BLOCK,), ACC)
    small = numbers == classes
    in_class = tl.load(in_band + r, mask=small, other=0.0) + squared * squared
    own_form = tl.where(small, in_class, own_form)
    others_form = tl.where(small, others_form - in_class, others_form)
    loss = _store_means(
        own_form, others_form, squared, members, rows, r, inside, is_active, means, losses,
        all_, tl.full((), margin, ACC), sigma, BY_ROW,
    )  # fmt: skip
    if not BY_ROW:
        tl.store(losses + tl.program_id(0), tl.sum(loss, axis=0) * tl.full((), scale, ACC))


@triton.jit(do_not_specialize=["n", "run", "least", "stride"])
def band_gradient(
    rows,
    columns_before,
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
    """What a small row's own class adds to dL/du_i: see `kernels`.

    Program (p, s) has every num_programs(1)-th block of the p-th run. It forms each block of S once
    and adds its products with BLOCK_V columns at a time to `gradient`, which L2 holds meanwhile:
    12 D FLOPs a pair (4 D without SPLIT).
    """
    begin, end = _run(run, n)
    if tl.load(small_rows + tl.program_id(0)) == 0:
        end = begin
    for block in range(begin + tl.program_id(1) * BLOCK, end, tl.num_programs(1) * BLOCK):
        r = block + tl.arange(0, BLOCK)
        small, c_first, near, far = _band(rows, r, r < end, least, n)
        w_i = _weight(weights, rows, columns_before, r, small, UNIFORM)
        members = _members(rows, r, small)
        members, all_ = _counted(members, n, columns_before, c_first, c_first + members, small)
        p, q = _class_weights(members, all_, rows.inverse.dtype.element_ty)
        factor = (p + sigma * q) * (-4 / (UNIT * UNIT))
        row = gradient + tl.load(rows.order + r, mask=small, other=0)[:, None] * stride
        for at in range(near, far, BLOCK):
            j = at + tl.arange(0, BLOCK)
            inside = j < far
            s = _band_similarity(rows, r, small, j, inside, DP, BLOCK_D, SPLIT)
            pair = c_first[:, None] == tl.load(rows.first + j, mask=inside, other=-1)[None, :]
            pair = pair & small[:, None]
            if columns_before is None:
                pair = pair & (r[:, None] != j[None, :])
            else:
                is_column = _is_column(columns_before, r, small)[:, None]
                pair = pair & (is_column != _is_column(columns_before, j, inside)[None, :])
            w_j = _weight(weights, rows, columns_before, j, inside, UNIFORM)
            weight = tl.where(pair, s * (w_i[:, None] + w_j[None, :]), 0.0)
            weight = _split(weight * (UNIT / 2))
            tl.debug_barrier()  # another thread may have written what this one reads
            for start in range(0, DP, BLOCK_V):
                k = start + tl.arange(0, BLOCK_V)
                u = _load_rows(rows, j, inside, k, DP, SPLIT)
                v = _product(weight, u, SPLIT) * factor[:, None]
                written = small[:, None] & (k < d)[None, :]
                v += tl.load(row + k[None, :], mask=written & (at > near), other=0.0)
                tl.store(row + k[None, :], v, mask=written)


@triton.jit
def _add_products(
    v, rows, r, numbers, wanted, matrices, classes, start,
    DP: tl.constexpr, TILE: tl.constexpr, SCALED: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """v + TILE rows of M u from `start` on, M of each row's own number, for the wanted rows."""
    number = tl.min(numbers, axis=0)
    while number <= classes:
        mask = (numbers == number) & wanted
        if tl.max(mask.to(tl.int32), axis=0) > 0:
            for column in range(0, DP, BLOCK_K):
                v += _times_block(
                    rows, r, mask, matrices, number, start, column,
                    DP, TILE, SCALED, BLOCK_K, SPLIT,
                )  # fmt: skip
        number = _next(numbers, number, classes)
    return v


@triton.jit(do_not_specialize=["n", "least", "classes", "stride"])
def row_gradients(
    rows,
    columns_before,
    weights,
    active,
    back,
    gradient,
    n,
    least,
    classes,
    d,
    stride,
    scale: tl.float64,
    DP: tl.constexpr,
    TILE: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    UNIFORM: tl.constexpr,
):
    """dL/df of a block of rows, in the given order, from v = w K u + B u: dL/du over the largest a.

    `gradient` holds what `band_gradient` found for small rows. Blocks of v go there; the projection
    needs the whole v . u, so where there are several the program reads them once more. 6 D^2 FLOPs
    a row (2 D^2 without SPLIT). Without other columns, twice that for active small rows and,
    without UNIFORM, for all active rows.
    """
    ACC: tl.constexpr = rows.inverse.dtype.element_ty
    r, inside, members, numbers = _rows_of(rows, n, least, classes, BLOCK)
    small = numbers == classes
    w = _weight(weights, rows, columns_before, r, inside, UNIFORM)
    begins = tl.load(rows.first + r, mask=inside, other=0)
    own, all_ = _counted(members, n, columns_before, begins, begins + members, inside)
    row_factor = tl.where(small, _class_weights(own, all_, ACC)[1], 1.0)
    if not UNIFORM:
        row_factor *= w
    if columns_before is not None:
        has_back = _is_column(columns_before, r, inside)
    elif UNIFORM:
        has_back = small | (w == 0)
    else:
        has_back = inside
    row = gradient + tl.load(rows.order + r, mask=inside, other=0)[:, None] * stride
    along = tl.zeros((BLOCK,), ACC)
    for start in range(0, DP, TILE):
        c = start + tl.arange(0, TILE)
        v = tl.zeros((BLOCK, TILE), ACC)
        v = _add_products(
            v, rows, r, numbers, w != 0, active, classes, start, DP, TILE, SCALED, BLOCK_K, SPLIT
        )
        v *= row_factor[:, None]
        v = _add_products(
            v, rows, r, numbers, has_back, back, classes, start, DP, TILE, SCALED, BLOCK_K, SPLIT
        )
        written = inside[:, None] & (c < d)[None, :]
        in_band = written & (small & (members > 1))[:, None]
        v += tl.load(row + c[None, :], mask=in_band, other=0.0)
        u = _whole(_load_rows(rows, r, inside, c, DP, SPLIT), SPLIT) * (1 / UNIT)
        along += tl.sum(v * u, axis=1)
        if DP == TILE:
            factor = (tl.load(weights.largest) * scale).to(ACC)
            v = _project(v, u, along, rows, r, inside, factor)
        tl.store(row + c[None, :], v, mask=written)
    if DP > TILE:
        tl.debug_barrier()  # another thread may have written what this one reads
        factor = (tl.load(weights.largest) * scale).to(ACC)
        for start in range(0, DP, TILE):
            c = start + tl.arange(0, TILE)
            written = inside[:, None] & (c < d)[None, :]
            u = _whole(_load_rows(rows, r, inside, c, DP, SPLIT), SPLIT) * (1 / UNIT)
            v = tl.load(row + c[None, :], mask=written, other=0.0)
            v = _project(v, u, along, rows, r, inside, factor)
            tl.store(row + c[None, :], v, mask=written)
