"""similarity="linear" by sums of classes: time O(N D) on every device, and nothing is N x M.

With u_i the unit rows, m_c the sum of the unit columns of class c, m that of all columns, and p_i
and q_i one over the number of row i's positives and of its negatives (0 where there are none):

    mean over P_i = p_i (u_i . m_c - |u_i|^2)        mean over Q_i = q_i u_i . (m - m_c)

where |u_i|^2 is of a row that is itself a column. With a_i = dL/dl_i [h_i > 0], b_c the sum of
a_i u_i over the rows of class c, and b that of q_i a_i u_i over all rows:

    v_i = a_i (sigma q_i (m - m_c) - p_i m_c) + sigma (b - q_i b_c) - p_i b_c

What of it is parallel to u_i projects away. With ref_emb a row has the terms with a_i, and a column
the others, with p and q of its class. Sums are in float64, where a class cancels from the sum of
all to sixteen digits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...cost import Operations, Work
from ...spec import accumulation_dtype
from .mathematics import class_weights, inverse_norms, through_normalisation

SCHEDULE = "class sums"
PANEL_NUMBERS = {"cpu": 1 << 18, "other": 1 << 23}
"""Numbers of rows at a time: what a cache holds, and what is worth a GPU's launches."""
_BLOCK = 128  # rows whose running sums one product forms


class ClassSums:
    """The sum of each class of rows [n, D], float64. Asks no GPU how many classes there are."""

    def __init__(self, embeddings: Tensor, scales: Tensor, labels: Tensor) -> None:
        """Of embeddings [n, D] times scales [n], in the dtype of the scales."""
        d = embeddings.shape[1]
        if _may_count(labels):
            self.keys, index, self.counts = labels.unique(return_inverse=True, return_counts=True)
            self.table = embeddings.new_zeros((len(self.keys), d), dtype=torch.float64)
            for rows in _panels(embeddings):
                scaled = _scaled(embeddings, scales, rows)
                self.table.index_add_(0, index[rows], scaled.double())
            self.total = self.table.sum(0)
        else:
            order = labels.argsort(stable=True)
            self.keys, scaled = labels[order], embeddings[order].to(scales.dtype)
            self.table = running_sums(scaled.mul_(scales[order, None]).double())
            self.total = self.table[-1]

    def count(self, labels: Tensor) -> Tensor:
        """How many rows are of each class, [k] for labels [k]."""
        if _may_count(labels):
            found, is_known = self._find(labels)
            return self.counts[found].where(is_known, torch.zeros_like(found))
        return self._edge(labels, True) - self._edge(labels, False)

    def of(self, labels: Tensor) -> Tensor:
        """The sums of the classes of labels [k], [k, D]; 0 where there is no row."""
        if _may_count(labels):
            found, is_known = self._find(labels)
            return self.table[found].masked_fill(~is_known[:, None], 0.0)
        return self.table[self._edge(labels, True)] - self.table[self._edge(labels, False)]

    def _find(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        found = torch.searchsorted(self.keys, labels).clamp(max=len(self.keys) - 1)
        return found, self.keys[found] == labels

    def _edge(self, labels: Tensor, right: bool) -> Tensor:
        return torch.searchsorted(self.keys, labels, right=right)


def _may_count(labels: Tensor) -> bool:
    """Whether to ask how many classes there are stops nothing."""
    return labels.device.type == "cpu"


def running_sums(x: Tensor) -> Tensor:
    """Sums of the first k rows of x [n, D] for k from 0 to n, [n + 1, D], by products.

    Their order is fixed, where `torch.cumsum` on a GPU gives other bits from run to run.
    """
    n, d = x.shape
    if n <= _BLOCK:
        return torch.cat((x.new_zeros(1, d), x.new_ones(n, n).tril() @ x))
    blocks = torch.nn.functional.pad(x, (0, 0, 0, -n % _BLOCK)).unflatten(0, (-1, _BLOCK))
    within = x.new_ones(_BLOCK, _BLOCK).tril() @ blocks
    within += running_sums(within[:, -1])[:-1, None]
    return torch.cat((x.new_zeros(1, d), within.flatten(0, 1)[:n]))


def _panels(embeddings: Tensor) -> Iterator[slice]:
    n, d = embeddings.shape
    step = max(1, PANEL_NUMBERS["cpu" if embeddings.is_cpu else "other"] // d)
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def _scaled(embeddings: Tensor, scales: Tensor, rows: slice) -> Tensor:
    return embeddings[rows].to(scales.dtype) * scales[rows, None]


def forward(
    embeddings: Tensor,
    ref_emb: Tensor | None,
    labels: Tensor,
    ref_labels: Tensor | None,
    eps: float,
) -> list[Tensor]:
    """[positive [N], negative [N], *kept]: the two means of Eq. 3, and what `gradients` wants."""
    own = ref_emb is None or ref_labels is None
    dtype = accumulation_dtype(embeddings, *(() if ref_emb is None else (ref_emb,)))
    inverse = inverse_norms(embeddings, eps, dtype)
    columns, column_labels, column_inverse = embeddings, labels, inverse
    if ref_emb is not None and ref_labels is not None:
        columns, column_labels = ref_emb, ref_labels
        column_inverse = inverse_norms(ref_emb, eps, dtype)
    sums = ClassSums(columns, column_inverse, column_labels)
    p, q = class_weights(sums.count(labels), len(columns), own)
    positive, negative = torch.empty_like(p), torch.empty_like(p)
    for rows in _panels(embeddings):
        unit, own_sum = _scaled(embeddings, inverse, rows).double(), sums.of(labels[rows])
        itself = torch.linalg.vecdot(unit, unit) if own else 0.0
        positive[rows] = p[rows] * (torch.linalg.vecdot(unit, own_sum) - itself)
        negative[rows] = q[rows] * torch.linalg.vecdot(unit, sums.total - own_sum)
    kept = [labels, inverse, p, q]
    if not own:
        of_columns = class_weights(sums.count(column_labels), len(columns), own)
        kept += [column_labels, column_inverse, *of_columns]
    return [positive.to(dtype), negative.to(dtype), *kept]


def gradients(
    a: Tensor, embeddings: Tensor, ref_emb: Tensor | None, kept: list[Tensor], sigma: float
) -> list[Tensor]:
    """[dL/d(embeddings)], and dL/d(ref_emb) where there is one, for a = dL/dl [h > 0], [N]."""
    labels, inverse, p, q = kept[:4]
    n, d = embeddings.shape
    back = ClassSums(embeddings, inverse * a, labels)
    weight = inverse.double() * a.double() * q
    b = sum(
        (weight[None, rows] @ embeddings[rows].double() for rows in _panels(embeddings)),
        start=weight.new_zeros(1, d),
    )[0]

    def from_rows(rows: slice, labels: Tensor, p: Tensor, q: Tensor) -> Tensor:
        """What the rows' losses make of columns."""
        of_class = back.of(labels[rows])
        return sigma * (b - q[rows, None] * of_class) - p[rows, None] * of_class

    columns = kept[4:] or [labels, inverse]
    sums = ClassSums(embeddings if ref_emb is None else ref_emb, columns[1], columns[0])
    gradient = embeddings.new_empty((n, d), dtype=inverse.dtype)
    for rows in _panels(embeddings):
        of_class = sums.of(labels[rows])
        v = (a[rows] * sigma * q[rows])[:, None] * (sums.total - of_class)
        v -= (a[rows] * p[rows])[:, None] * of_class
        if ref_emb is None:
            v += from_rows(rows, labels, p, q)
        gradient[rows] = _normalised(v, embeddings, inverse, rows)
    if ref_emb is None:
        return [gradient]
    column_labels, column_inverse, column_p, column_q = columns
    ref_gradient = ref_emb.new_empty(ref_emb.shape, dtype=inverse.dtype)
    for rows in _panels(ref_emb):
        v = from_rows(rows, column_labels, column_p, column_q)
        ref_gradient[rows] = _normalised(v, ref_emb, column_inverse, rows)
    return [gradient, ref_gradient]


def _normalised(v: Tensor, embeddings: Tensor, inverse: Tensor, rows: slice) -> Tensor:
    unit = _scaled(embeddings, inverse, rows)
    return through_normalisation(v.to(unit.dtype), unit, inverse[rows])


_FLOPS_A_SUM, _BYTES_A_SUM = 2 * _BLOCK + 2, 298  # of a number that goes into `running_sums`


def operations(work: Work) -> Operations:
    """A few numbers for each of the embeddings' on the CPU; elsewhere running sums are products.

    There the columns are added up forward, and columns and rows backward. Launches are counted for
    two sides of equal size where there is a ref_emb.
    """
    side = work.vectors * work.d
    if work.device == "cpu":
        each, times = (32, 7) if work.wants_gradient else (10, 3)
        return Operations(each * side, times * side * work.dtype.itemsize, 0, SCHEDULE)
    summed = work.columns * work.d
    if work.wants_gradient:
        summed += (work.columns + work.n) * work.d
    flops, moved = _FLOPS_A_SUM * summed, _BYTES_A_SUM * summed
    levels, rows = 1, work.columns
    while rows > _BLOCK:
        levels, rows = levels + 1, -(-rows // _BLOCK)
    more = -(-work.n * work.d // PANEL_NUMBERS["other"]) - 1
    launches = 58 + 7 * (levels - 1) + 19 * more + (0 if work.m is None else 17 - 2 * more)
    by_row = work.reduction == "none"
    launches += (2 + more) * work.casts - by_row
    if work.wants_gradient:
        launches = 126 + 21 * (levels - 1) + 52 * more + (0 if work.m is None else 23 + 4 * more)
        launches += (6 + 2 * more) * work.casts - 2 * by_row
    return Operations(flops, moved, launches, SCHEDULE)


def extra_memory(work: Work, class_sizes: Sequence[int]) -> int:
    """Peak bytes beyond the inputs: float64 sums, on the CPU of classes, else of all rows."""
    number, d = work.accumulated, work.d
    vectors = work.n * (3 * number + 24) + (0 if work.m is None else work.m * (number + 24))
    numbers = max(work.n, work.columns) * d
    if work.device == "cpu":
        sums = len(class_sizes) * 16 * (d + 1)
        of_panel = 32 if not work.wants_gradient else 48 if work.m is None else 36
        panel = min(numbers, PANEL_NUMBERS["cpu"]) * of_panel
        return vectors + sums + work.gradient_bytes + max(panel, work.cast_bytes)
    making, held = numbers * 36, numbers * 8  # running sums
    if not work.wants_gradient:
        return vectors + max(making, held + min(numbers, PANEL_NUMBERS["other"]) * 32)
    panel = min(numbers, PANEL_NUMBERS["other"]) * 48
    walking = 2 * held + work.gradient_bytes + max(panel, work.cast_bytes)
    return vectors + max(making + held, walking)
