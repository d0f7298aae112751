"""similarity="linear" by sums of classes: time O(N D) on every device, and nothing is N x M.

It serves the CPU, and GPUs where the Triton kernels of `class_sums_on_gpu` do not run.

With u_i the unit rows, m_c the sum of the unit columns of class c, m that of all columns, and p_c
and q_c one over the number of positives and of negatives of a row of class c (0 where there are
none):

    mean over P_i = u_i . (p_c m_c - p_c u_i)        mean over Q_i = u_i . q_c (m - m_c)

With ref_emb no row is a column, and the term p_c u_i drops out. With a_i = dL/dl_i [h_i > 0],
b_c the sum of a_i u_i over the rows of class c, and b that of q_c b_c over all classes:

    v_i = a_i K_c + B_c
    K_c = sigma q_c (m - m_c) - p_c m_c        B_c = sigma (b - q_c b_c) - p_c b_c

The part of v_i along u_i projects away. With ref_emb a row has a_i K_c alone, and a column B_c.
Sums are in float64 (on the CPU over bags of rows), so that m - m_c keeps sixteen digits. A class's
vectors are rounded once, to the accumulation dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from ...cost import Cost, Work
from ...spec import Rows, accumulation_dtype, denormalise_gradient
from .mathematics import class_weights, inverse_norms

SCHEDULE = "class sums"
PANEL_NUMBERS = {"cpu": 1 << 17, "other": 1 << 23}
"""Numbers of a panel of rows: as many as a cache holds, or as are worth a GPU's launches."""
_BAG = 64  # rows of a class that are added up in the accumulation dtype
_BLOCK = 128  # rows whose running sums one product forms


def means(
    embeddings: Tensor,
    ref_emb: Tensor | None,
    labels: Tensor,
    ref_labels: Tensor | None,
    eps: float,
) -> tuple[Rows, tuple[Tensor, ...]]:
    """The two means of Eq. 3, and what `gradients` needs.

    That is m_c, p_c and q_c of each class; then for each side 1 / norm and its rows' classes.
    """
    own = ref_emb is None
    dtype = accumulation_dtype(embeddings, *(() if ref_emb is None else (ref_emb,)))
    inverse = inverse_norms(embeddings, eps, dtype)
    classes, n_classes = number_classes(labels, ref_labels)
    columns, sides = embeddings, [inverse, classes]
    if ref_emb is not None:
        classes, of_columns = classes.split((len(embeddings), len(ref_emb)))
        columns, sides = ref_emb, [inverse, classes, inverse_norms(ref_emb, eps, dtype), of_columns]
    column_inverse, column_classes = sides[-2:]
    order, edges = class_order(column_classes, n_classes)
    sums = sum_classes(columns, column_inverse, order, edges)
    p, q = class_weights(edges.diff(), len(columns), own)
    table = inverse.new_empty(n_classes, 2, sums.shape[1])
    table[:, 0] = p[:, None] * sums
    table[:, 1] = (sums.sum(0) - sums).mul_(q[:, None])
    both = inverse.new_empty(len(inverse), 2)
    itself = p.to(dtype)[classes] * inverse if own else None  # p_c / norm
    for rows in _panels(embeddings):
        pair, wide = table.index_select(0, classes[rows]), embeddings[rows].to(dtype)
        if itself is not None:  # after the product it would cancel digits
            pair[:, 0].addcmul_(wide, itself[rows, None], value=-1.0)
        both[rows] = torch.linalg.vecdot(pair, wide[:, None])
    return Rows(*both.mul_(inverse[:, None]).unbind(1)), (sums, p, q, *sides)


def gradients(
    a: Tensor,
    embeddings: Tensor,
    ref_emb: Tensor | None,
    kept: tuple[Tensor, ...],
    sigma: float,
) -> tuple[Tensor, Tensor | None]:
    """dL/d(embeddings), and dL/d(ref_emb) where given, for a = dL/dl [h > 0], [N]."""
    sums, p, q, inverse, classes, *of_columns = kept
    back = sum_classes(embeddings, inverse * a, *class_order(classes, len(sums)))
    table = inverse.new_empty(len(sums), 2, sums.shape[1])
    write_shares(table, sums, back, p[:, None], q[:, None], sigma)
    del back
    if ref_emb is None:
        return _gradient(embeddings, inverse, table, classes, a), None
    return (
        _gradient(embeddings, inverse, table[:, :1], classes, a),
        _gradient(ref_emb, of_columns[0], table[:, 1:], of_columns[1], None),
    )


def write_shares(
    table: Tensor, sums: Tensor, back: Tensor, p: Tensor, q: Tensor, sigma: float
) -> None:
    """Write K_c and B_c of each class to the table, [C, 2, D], from m_c and b_c, [C, D] each."""
    share = (sums.sum(0) - sums).mul_(sigma * q)
    table[:, 0] = share.addcmul_(p, sums, value=-1.0)
    torch.mul(q, back, out=share)
    torch.sub(share.sum(0), share, out=share).mul_(sigma)
    table[:, 1] = share.addcmul_(p, back, value=-1.0)


def _gradient(
    embeddings: Tensor, inverse: Tensor, table: Tensor, classes: Tensor, a: Tensor | None
) -> Tensor:
    """dL/df of a side whose classes have K_c, B_c or both of them in the table, [C, 1 or 2, D]."""
    gradient = inverse.new_empty(embeddings.shape)
    for rows in _panels(embeddings):
        first, *second = table.index_select(0, classes[rows]).unbind(1)
        v = first if a is None else first.mul_(a[rows, None])
        v = v.add_(second[0]) if second else v
        unit = embeddings[rows].to(inverse.dtype) * inverse[rows, None]
        gradient[rows] = denormalise_gradient(v, unit, inverse[rows])
    return gradient


def number_classes(labels: Tensor, ref_labels: Tensor | None) -> tuple[Tensor, int]:
    """Class numbers from 0 on, of the rows and then of the columns, and the most there can be.

    That is exact on the CPU. A GPU is not asked: it is the number of labels.
    """
    labels = labels if ref_labels is None else torch.cat((labels, ref_labels))
    if _may_count(labels):
        values, classes = labels.unique(return_inverse=True)
        return classes, len(values)
    ordered, order = labels.sort(stable=True)
    first = pad(ordered[1:] != ordered[:-1], (1, 0))
    return torch.empty_like(order).index_copy_(0, order, first.cumsum(0)), len(labels)


def class_order(classes: Tensor, n_classes: int) -> tuple[Tensor, Tensor]:
    """(order [N], edges [C + 1]): class c has the rows order[edges[c] : edges[c + 1]]."""
    ordered, order = classes.sort(stable=True)
    numbers = torch.arange(n_classes + 1, device=classes.device)
    return order, torch.searchsorted(ordered, numbers)


def sum_classes(embeddings: Tensor, weights: Tensor, order: Tensor, edges: Tensor) -> Tensor:
    """The sum over each class of weights [N] times embeddings [N, D], [C, D] in float64.

    order, edges: as `class_order` returns them. The order of addends is fixed: the same bits from
    run to run.
    """
    if not _may_count(order):
        scaled = embeddings[order].to(weights.dtype).mul_(weights[order, None])
        return running_sums(scaled.double())[edges].diff(dim=0)
    sizes = edges.diff()
    bags = (sizes + _BAG - 1) // _BAG
    of_bag = torch.repeat_interleave(bags)
    first = edges[of_bag] + _BAG * (torch.arange(len(of_bag)) - (bags.cumsum(0) - bags)[of_bag])
    parts = embedding_bag(
        order, embeddings.to(weights.dtype), first, mode="sum", per_sample_weights=weights[order]
    )
    total = torch.zeros(len(sizes), embeddings.shape[1], dtype=torch.float64)
    return total.index_add_(0, of_bag, parts.double())


def _may_count(classes: Tensor) -> bool:
    """Whether the host may ask how many classes there are: a GPU would make it wait."""
    return classes.device.type == "cpu"


def running_sums(x: Tensor) -> Tensor:
    """Sums of the first k rows of x [n, D] for k from 0 to n, [n + 1, D], by products.

    Their order is fixed. `torch.cumsum` on a GPU gives other bits from run to run.
    """
    n, d = x.shape
    if n <= _BLOCK:
        return torch.cat((x.new_zeros(1, d), x.new_ones(n, n).tril() @ x))
    blocks = pad(x, (0, 0, 0, -n % _BLOCK)).unflatten(0, (-1, _BLOCK))
    within = x.new_ones(_BLOCK, _BLOCK).tril() @ blocks
    within += running_sums(within[:, -1])[:-1, None]
    return torch.cat((x.new_zeros(1, d), within.flatten(0, 1)[:n]))


def _panels(embeddings: Tensor) -> Iterator[slice]:
    n, d = embeddings.shape
    step = max(1, PANEL_NUMBERS["cpu" if embeddings.is_cpu else "other"] // d)
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def cost(work: Work, class_sizes: Sequence[int]) -> Cost:
    """FLOPs and bytes are a few for each number of the embeddings; on a GPU, by products, many.

    There the forward adds up the columns, and the backward the rows. Launches are counted for two
    sides of equal size where there is a ref_emb.
    """
    side, wanted = work.vectors * work.d, work.wants_gradient
    if work.device == "cpu":
        flops, times = (18, 7) if wanted else (8, 3)
        flops += 2 * (work.m is None)  # a row's own share
        table = len(class_sizes) * work.d * (4 if wanted else 2)
        return Cost(
            flops=flops * side + 4 * table,
            bytes=times * side * work.dtype.itemsize + 24 * table,
            launches=0,
            extra_memory=_extra_memory(work, len(class_sizes)),
            schedule=SCHEDULE,
        )
    summed = (work.columns + work.n * wanted) * work.d
    return Cost(
        flops=2 * min(_BLOCK + 1, work.n) * summed,
        bytes=_bytes(work) * work.d,
        launches=_launches(work),
        extra_memory=_extra_memory_on_gpu(work),
        schedule=SCHEDULE,
    )


def _bytes(work: Work) -> int:
    """For each column of the embeddings: what operators on a GPU read and write.

    Rows are added up, then a table of as many classes as there are vectors is made, then walked.
    """
    number = work.accumulated
    own = work.m is None
    moved = (98 + number) * work.columns + (114 + 5 * number) * work.vectors
    moved += (14 if own else 11) * number * work.n
    if work.wants_gradient:
        walked = 202 + (25 if own else 20) * number
        moved += (95 + 3 * number) * work.n + walked * work.vectors
    return moved


def _launches(work: Work) -> int:
    levels, rows = 0, work.columns
    while rows > _BLOCK:
        levels, rows = levels + 1, -(-rows // _BLOCK)
    more = -(-work.n * work.d // PANEL_NUMBERS["other"]) - 1
    own, by_row = work.m is None, work.reduction == "none"
    if not work.wants_gradient:
        cast = (2 + more) * work.casts
        return 58 + 7 * levels + 4 * more + (more if own else 2) + cast - by_row
    cast = (5 + 2 * more if own else 7 + 3 * more) * work.casts
    return 101 + 14 * levels + 14 * more + (0 if own else 8 + 5 * more) + cast - 2 * by_row


def _extra_memory(work: Work, classes: int) -> int:
    """On the CPU: sums and tables of classes, and a panel of rows with their classes' vectors."""
    d, number = work.d, work.accumulated
    longer = max(work.n, work.columns)
    vectors = work.vectors * (number + 8) + 4 * work.n * number
    sorting = 5 * 8 * work.vectors
    widened = longer * d * number if work.casts else 0
    bags = -(-longer // _BAG) + classes
    adding = widened + bags * (d * (number + 8) + 24) + 3 * 8 * longer
    panel = max(PANEL_NUMBERS["cpu"], d)
    rows, columns = (min(size * d, panel) * number for size in (work.n, work.columns))
    table = 2 * classes * d * number
    sums = 8 * classes * d
    held = 4 if work.n * d <= panel else 5  # with what is left of the previous panel
    forward = max(sums + adding, 2 * sums + table, sums + table + held * rows)
    if not work.wants_gradient:
        return vectors + max(sorting, forward)
    backward = 2 * sums + max(adding, sums + table)
    walking = held * rows if work.m is None else 3 * columns
    walking = sums + table + work.gradient_bytes + max(walking, work.cast_bytes)
    return vectors + max(sorting, forward, backward, walking)


def _extra_memory_on_gpu(work: Work) -> int:
    """Running sums of all rows, then sums and tables of as many classes as there are labels."""
    d, number = work.d, work.accumulated
    classes, panel = work.vectors * d, min(work.n * d, PANEL_NUMBERS["other"])
    making, table = 36 if max(work.n, work.columns) > _BLOCK else 28, 8 + 2 * number
    forward = max(making * work.columns * d, (8 + table) * classes, table * classes + 16 * panel)
    vectors = work.vectors * (number + 8) + 3 * work.n * number + 16 * work.vectors
    if not work.wants_gradient:
        return vectors + forward
    walking = table * classes + work.gradient_bytes + max(16 * panel, work.cast_bytes)
    backward = max(8 * classes + making * work.n * d, (16 + table) * classes, walking)
    return vectors + max(forward, backward)
