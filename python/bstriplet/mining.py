"""Groups of similar samples within each class (section 2.3, steps 1 and 2).

K-means in each class, for image sets of any size. It clusters at most 64 principal coordinates of
features with many dimensions, and uses mini-batches for a large class. Features are read in chunks:
they may be a memory map of a file that does not fit into memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from numbers import Integral
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import silhouette_score
from sklearn.utils import check_scalar
from threadpoolctl import threadpool_limits

# Dimensions that K-means sees. The means of k clusters span k - 1 directions, near those of largest
# variance (Ding & He, ICML 2004): 64 leave ample room, and the cost of K-means is linear in them.
PCA_COMPONENTS = 64

# Features of more dimensions than this are projected. With fewer dimensions, the projection costs
# as much as it saves.
PCA_ABOVE = 4 * PCA_COMPONENTS

# Samples of a class from which its principal directions are estimated: 32 for each of them, in
# memory that does not grow with the class.
PCA_SAMPLES = 32 * PCA_COMPONENTS

# Classes of more samples are clustered in mini-batches, in some seconds per million samples. Full
# passes until convergence would take minutes.
MINI_BATCH_ABOVE = 20_000

# The largest number of groups per class that n_groups="auto" considers.
MAX_AUTO_GROUPS = 8

_AUTO_SAMPLES = 500  # a silhouette compares every pair of them
_AUTO_REFERENCES = 19
_CHUNK_VALUES = 1 << 22  # feature values held at a time


def mine_groups(
    features: ArrayLike | torch.Tensor,
    labels: ArrayLike | torch.Tensor,
    n_groups: int | Mapping[Any, int] | Literal["auto"] = 2,
    *,
    rows: ArrayLike | None = None,
    seed: int = 0,
) -> NDArray[np.int64]:
    """Cluster the samples of each class by K-means; return the group of each sample.

    Distances are Euclidean on the given features; dimensions are not rescaled. Features of more
    than `PCA_ABOVE` dimensions are first reduced to the `PCA_COMPONENTS` principal components of
    the class. Classes of more than `MINI_BATCH_ABOVE` samples are clustered by `MiniBatchKMeans`.

    Args:
        features: [N, ...] real numbers, array or tensor (pixels, embeddings); taken as [N, D]. A
            `numpy.memmap` is read in chunks.
        labels: [N] integers, bools or strings: the class of each sample.
        n_groups: number of groups per class (2 in the paper's Chest-1), a mapping from class to
            number, or `"auto"`. `"auto"` takes the number from 2 to `MAX_AUTO_GROUPS` with the best
            mean silhouette (Rousseeuw, 1987). It takes 1 for a class without visible clusters: if
            Gaussian samples of the same covariance have as good a silhouette.
        rows: [N] integers: the rows of features that are the samples. Default: all rows. The result
            is that of `features[rows]`, without a copy of the features.
        seed: 0 to 2³² - 1. The same input and seed give the same groups.

    Returns:
        [N] int64: group ids from 0 without gaps. They ascend with the sorted classes, and within a
        class in order of first appearance. A class with fewer distinct samples than groups asked
        for gets one group per distinct sample; no group is empty.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is allowed.
    """
    table = _feature_rows(features)
    samples = _Samples(table, _row_numbers(rows, len(table)))
    classes, members_of = _classes(labels, len(samples))
    wanted = _groups_wanted(n_groups, classes)
    check_scalar(seed, "seed", Integral, min_val=0, max_val=2**32 - 1)
    spread = _finite_spread(samples)
    groups = np.empty(len(samples), dtype=np.int64)
    n_found = 0
    # K-means sums over threads in the order in which they finish. One thread gives the same bits
    # each time.
    with threadpool_limits(limits=1, user_api="openmp"), warnings.catch_warnings():
        # KMeans warns if samples coincide up to rounding and make fewer clusters. That is allowed.
        warnings.simplefilter("ignore", ConvergenceWarning)
        for members, count in zip(members_of, wanted, strict=True):
            clusters: NDArray[Any] | None = _one_group_each(samples, members, count or 1)
            if clusters is None:
                points = _principal_points(samples, members, spread, int(seed))
                clusters = _k_means(points, count or _choose_count(points, int(seed)), int(seed))
            within = _in_order_of_appearance(clusters)
            groups[members] = n_found + within
            n_found += int(within.max()) + 1
    return groups


class _Samples(NamedTuple):
    """Features [M, D] and the rows [N] of them that are the samples."""

    table: NDArray[Any]
    rows: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, positions: NDArray[np.int64]) -> NDArray[Any]:
        """[n, D] copies of the features of n samples."""
        return self.table[self.rows[positions]]

    def chunks(self, positions: NDArray[np.int64]) -> Iterator[NDArray[Any]]:
        """The features of samples, in their order, in chunks of at most `_CHUNK_VALUES` values."""
        size = max(1, _CHUNK_VALUES // self.table.shape[1])
        for start in range(0, len(positions), size):
            yield self.at(positions[start : start + size])


def _one_group_each(
    samples: _Samples, members: NDArray[np.int64], limit: int
) -> NDArray[np.int64] | None:
    """One cluster per distinct row of a class; None if it has more than `limit` distinct rows."""
    cluster_of: dict[bytes, int] = {}
    clusters = []
    for member in members:
        row = (samples.at(member) + 0).tobytes()  # + 0 turns -0.0 into 0.0, which equals it
        clusters.append(cluster_of.setdefault(row, len(cluster_of)))
        if len(cluster_of) > limit:
            return None
    return np.array(clusters)


def _principal_points(
    samples: _Samples, members: NDArray[np.int64], spread: float, seed: int
) -> NDArray[np.float32]:
    """[n, min(D, PCA_COMPONENTS)] coordinates of one class about its mean, in units of `spread`.

    K-means does not depend on origin and unit. Coordinates that were centred in float64 and are of
    order one fit float32: precise enough and far from overflow, for features of any range.
    """
    n_dims = samples.table.shape[1]
    total = sum(chunk.sum(axis=0, dtype=np.float64) for chunk in samples.chunks(members))
    mean = total / len(members)

    def centred(selected: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
        for chunk in samples.chunks(selected):
            yield ((chunk - mean) / spread).astype(np.float32)

    def all_centred(selected: NDArray[np.int64]) -> NDArray[np.float32]:
        points = np.empty((len(selected), n_dims), dtype=np.float32)
        filled = 0
        for chunk in centred(selected):  # a list of chunks would take the memory twice
            points[filled : filled + len(chunk)] = chunk
            filled += len(chunk)
        return points

    if n_dims <= PCA_ABOVE:
        return all_centred(members)
    fitted = members
    if len(members) > PCA_SAMPLES:
        fitted = np.random.default_rng(seed).choice(members, PCA_SAMPLES, replace=False)
    pca = PCA(
        min(PCA_COMPONENTS, len(fitted)),
        copy=False,
        svd_solver="randomized",
        iterated_power=2,
        random_state=seed,
    )
    pca.fit(all_centred(fitted))
    return np.concatenate([pca.transform(chunk) for chunk in centred(members)])


def _k_means(points: NDArray[np.float32], count: int, seed: int) -> NDArray[Any]:
    if count == 1:
        return np.zeros(len(points), dtype=np.int64)
    if len(points) > MINI_BATCH_ABOVE:
        model = MiniBatchKMeans(count, batch_size=4096, n_init=4, random_state=seed)
    else:
        model = KMeans(count, n_init=4, random_state=seed)
    return model.fit_predict(points)


def _choose_count(points: NDArray[np.float32], seed: int) -> int:
    """Number of clusters, 1 to MAX_AUTO_GROUPS: the best silhouette against a Gaussian null.

    The silhouette alone never gives 1: it is positive even for a single cloud that is cut in two.
    As in SigClust (Liu, Hayes, Nobel & Marron, JASA 2008), the clusters must have a better
    silhouette than those of Gaussian samples with the covariance of the data: better than all of
    19, a test at the level of 5 %.
    """
    rng = np.random.default_rng(seed)
    if len(points) > _AUTO_SAMPLES:
        points = points[rng.choice(len(points), _AUTO_SAMPLES, replace=False)]
    score, count = _best_silhouette(points, seed)
    # Sums of the n deviations with standard normal weights have exactly the covariance of the data.
    n = len(points)
    deviations = (points - points.mean(axis=0)) / np.float32(np.sqrt(n))
    for _ in range(_AUTO_REFERENCES):
        reference = rng.standard_normal((n, n), dtype=np.float32) @ deviations
        if _best_silhouette(reference, seed)[0] >= score:
            return 1
    return count


def _best_silhouette(points: NDArray[np.float32], seed: int) -> tuple[float, int]:
    """(mean silhouette, number of clusters) of the best clustering into 2, 3, ... clusters."""
    scores = [(-1.0, 1)]
    for count in range(2, min(MAX_AUTO_GROUPS, len(points) - 1) + 1):
        clusters = _k_means(points, count, seed)
        if 1 < len(np.unique(clusters)) < len(points):
            scores.append((float(silhouette_score(points, clusters)), count))
    return max(scores)


def _in_order_of_appearance(clusters: NDArray[Any]) -> NDArray[np.int64]:
    _, first, inverse = np.unique(clusters, return_index=True, return_inverse=True)
    position = np.empty(len(first), dtype=np.int64)
    position[np.argsort(first)] = np.arange(len(first))
    return position[inverse]


def _feature_rows(features: ArrayLike | torch.Tensor) -> NDArray[Any]:
    """Features as [N, D], of their own dtype."""
    if isinstance(features, torch.Tensor):
        features = features.detach().cpu()
        features = (features.float() if features.dtype == torch.bfloat16 else features).numpy()
    array = np.asarray(features)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"features has dtype {array.dtype}; it must hold real numbers")
    if array.ndim == 0 or array.size == 0:
        raise ValueError(f"features has shape {array.shape}; it must be [N, ...] and not empty")
    return array.reshape(len(array), -1)


def _row_numbers(rows: ArrayLike | None, n_rows: int) -> NDArray[np.int64]:
    """The given rows, checked; all rows for None."""
    if rows is None:
        return np.arange(n_rows)
    array = np.asarray(rows)
    if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu":
        raise TypeError(
            f"rows is {array.dtype} of shape {array.shape}; it must be [N] integers, N at least 1"
        )
    if array.min() < 0 or array.max() >= n_rows:
        raise ValueError(
            f"rows holds {array.min()} to {array.max()}; features has rows 0 to {n_rows - 1}"
        )
    return array.astype(np.int64)


def _finite_spread(samples: _Samples) -> float:
    """Largest value minus smallest; raises if it is not finite."""
    every = np.arange(len(samples))
    ends = np.array([(chunk.max(), chunk.min()) for chunk in samples.chunks(every)])
    spread = float(ends.max()) - float(ends.min())
    if np.isfinite(spread):
        return spread
    finite = [np.isfinite(chunk).all(axis=1) for chunk in samples.chunks(every)]
    bad = np.flatnonzero(~np.concatenate(finite))
    if bad.size:
        raise ValueError(
            f"features has NaN or infinity in {len(bad)} of {len(samples)} rows, the first is row "
            f"{samples.rows[bad[0]]}; K-means needs finite numbers: repair these samples or leave "
            "them out"
        )
    raise ValueError(f"features spans {ends.min()} to {ends.max()}, beyond float64: scale it down")


def _classes(
    labels: ArrayLike | torch.Tensor, n_samples: int
) -> tuple[list[Any], list[NDArray[np.int64]]]:
    """(classes in sorted order; the samples of each, ascending)."""
    array = (
        labels.detach().cpu().numpy() if isinstance(labels, torch.Tensor) else np.asarray(labels)
    )
    if array.shape != (n_samples,):
        raise ValueError(
            f"labels has shape {array.shape}; {n_samples} rows of features are the samples, so "
            f"labels must be ({n_samples},)"
        )
    if array.dtype.kind not in "iubU":
        raise TypeError(f"labels has dtype {array.dtype}; it must hold integers, bools or strings")
    classes, index, sizes = np.unique(array, return_inverse=True, return_counts=True)
    by_class = np.argsort(index, kind="stable")
    return classes.tolist(), np.split(by_class, np.cumsum(sizes)[:-1])


def _groups_wanted(
    n_groups: int | Mapping[Any, int] | Literal["auto"], classes: list[Any]
) -> list[int | None]:
    """Number of groups asked for in each class; None for "auto"."""
    if isinstance(n_groups, str):
        if n_groups != "auto":
            raise ValueError(f'n_groups={n_groups!r} must be "auto", an integer or a mapping')
        return [None] * len(classes)
    if not isinstance(n_groups, Mapping):
        return [int(check_scalar(n_groups, "n_groups", Integral, min_val=1))] * len(classes)
    missing = [name for name in classes if name not in n_groups]
    if missing:
        raise ValueError(
            f"n_groups lacks {missing}: it must give a number for each class in labels"
        )
    unknown = set(n_groups).difference(classes)
    if unknown:
        raise ValueError(
            f"n_groups names {sorted(unknown, key=str)}, but labels has only {classes}"
        )
    return [
        int(check_scalar(n_groups[name], f"n_groups[{name!r}]", Integral, min_val=1))
        for name in classes
    ]
