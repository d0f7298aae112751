"""The loss on pytorch-metric-learning's base class, in that library's own wrappers and reducers."""

import importlib
import sys

import pytest
import torch
from oracle import Formula, batch, plain_loss
from ranks import on_ranks, shards

import bstriplet_kernels
from bstriplet_kernels import available_impls, bstriplet_loss

pytest.importorskip("pytorch_metric_learning")
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers
from pytorch_metric_learning.utils import distributed as pml_distributed
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu

from bstriplet_kernels.metric_learning import (
    BSTripletLoss,
    CrossBatchMemory,
    SelfSupervisedLoss,
)

X, Y = batch(20, 6, 3, 0, torch.float32)
REF, REF_Y = batch(11, 6, 3, 1, torch.float32)
NOTHING = torch.empty(0, dtype=torch.int64)


def value_and_gradient(function, x=X):
    leaf = x.clone().requires_grad_()
    value = function(leaf)
    return value.detach(), *torch.autograd.grad(value, leaf)


def assert_same(ours, expected, x=X):
    """Value and gradient of both functions of x agree to rounding."""
    torch.testing.assert_close(value_and_gradient(ours, x), value_and_gradient(expected, x))


def listed_loss(x, columns, positive, negative, margin=0.9):
    """Eqs. 3 and 4 for the pairs of two masks [N, M], as one would write them."""
    normalize = torch.nn.functional.normalize
    squares = (normalize(x) @ normalize(columns).T).square()
    means = [(squares * m).sum(1) / m.sum(1).clamp_min(1) for m in (positive, negative)]
    return torch.relu(margin - means[0] + means[1]).mean()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"similarity": "linear"},
        {"margin": 0.4, "similarity": "signed_square"},
        {"eq3": "printed", "impl": "reference"},
    ],
)
def test_is_the_core_loss_to_the_bit(options):
    ours = value_and_gradient(lambda x: BSTripletLoss(**options)(x, Y))
    core = value_and_gradient(lambda x: bstriplet_kernels.BSTripletLoss(**options)(x, Y))
    assert all(torch.equal(a, b) for a, b in zip(ours, core, strict=True))


def test_options_are_checked_by_the_core():
    for keywords in ({"margin": 1.5}, {"similarity": "cosine"}, {"eps": 0}, {"impl": "none"}):
        with pytest.raises(ValueError, match=f"{next(iter(keywords))} must be"):
            BSTripletLoss(**keywords)
    with pytest.raises(ValueError, match=r"1 row, .*drop_last=True"):
        BSTripletLoss()(X[:1], Y[:1])


@pytest.mark.parametrize(
    ("error", "distance", "got"),
    [
        (TypeError, distances.LpDistance(), r"got LpDistance\(\)"),
        (TypeError, distances.DotProductSimilarity(), r"got DotProductSimilarity\(\)"),
        (TypeError, "cosine", "got 'cosine'"),
        (ValueError, distances.CosineSimilarity(p=1), "got p=1 and power=1"),
        (ValueError, distances.CosineSimilarity(power=2), "got p=2 and power=2"),
    ],
)
def test_a_distance_that_is_not_the_cosine_is_refused(error, distance, got):
    with pytest.raises(error, match=rf"distance must be CosineSimilarity\(\) .*{got}"):
        BSTripletLoss(distance=distance)


def test_the_cosine_is_taken_as_distance():
    assert_same(
        lambda x: BSTripletLoss(distance=distances.CosineSimilarity())(x, Y),
        lambda x: bstriplet_loss(x, Y),
    )


def mean_above(low, high=float("inf")):
    return lambda rows: rows[(rows > low) & (rows < high)].mean()


CLASS_WEIGHTS = torch.tensor([1.0, 2.0, 0.5])


@pytest.mark.parametrize(
    ("reducer", "expected"),
    [
        (reducers.AvgNonZeroReducer(), mean_above(0)),
        (reducers.ThresholdReducer(low=0.1, high=0.4), mean_above(0.1, 0.4)),
        (
            reducers.ClassWeightedReducer(CLASS_WEIGHTS),
            lambda rows: (rows * CLASS_WEIGHTS[Y]).mean(),
        ),
        (reducers.MultipleReducers({"loss": reducers.AvgNonZeroReducer()}), mean_above(0)),
        (reducers.MeanReducer(collect_stats=True), torch.mean),
    ],
)
def test_reducers(reducer, expected):
    loss = BSTripletLoss(0.3, reducer=reducer)

    def by_hand(x):
        rows = bstriplet_loss(x, Y, margin=0.3, reduction="none")
        assert 0 < (rows > 0).sum() < len(rows)
        return expected(rows)

    assert_same(lambda x: loss(x, Y), by_hand)
    if loss.reducer.collect_stats:
        assert loss.reducer.losses_size == len(X)


def test_a_reducer_that_does_nothing_hands_on_the_losses_of_the_rows():
    rows = BSTripletLoss(reducer=reducers.DoNothingReducer())(X, Y)["loss"]
    torch.testing.assert_close(rows["losses"], bstriplet_loss(X, Y, reduction="none"))
    assert torch.equal(rows["indices"], torch.arange(len(X)))
    assert rows["reduction_type"] == "element"


@pytest.mark.parametrize("reducer", [None, reducers.AvgNonZeroReducer()])
def test_embedding_regularizer(reducer):
    loss = BSTripletLoss(
        reducer=reducer,
        embedding_regularizer=regularizers.LpRegularizer(),
        embedding_reg_weight=0.1,
    )
    assert loss.sub_loss_names() == ["loss", "embedding_reg_loss"]
    norms = 0.1 * X.norm(dim=1).mean()
    assert_same(lambda x: loss(x, Y), lambda x: bstriplet_loss(x, Y) + 0.1 * x.norm(dim=1).mean())
    torch.testing.assert_close(loss(X, Y, (NOTHING, NOTHING, NOTHING)), norms)


def test_collected_statistics():
    cosine = distances.CosineSimilarity(collect_stats=True)
    loss = BSTripletLoss(0.3, distance=cosine, collect_stats=True)
    value = loss(X, Y)
    expected, stats = bstriplet_loss(X, Y, margin=0.3, return_stats=True)
    assert torch.equal(value, expected)
    assert loss._record_these == ["margin"]
    assert loss.margin == 0.3
    assert loss._record_these_stats == list(stats._fields)
    assert 0 < stats.active_fraction < 1
    for name, statistic in stats._asdict().items():
        assert getattr(loss, name) == statistic.item()
    assert cosine.initial_avg_query_norm == pytest.approx(X.norm(dim=1).mean().item())
    assert cosine.final_avg_ref_norm == pytest.approx(1)
    loss(X, Y, (NOTHING, NOTHING, NOTHING))
    assert loss.active_fraction == 0  # of this call, not of the one before
    assert not hasattr(BSTripletLoss(), "active_fraction")


@pytest.mark.parametrize("reducer", [None, reducers.AvgNonZeroReducer()])
def test_references(reducer):
    loss = BSTripletLoss(reducer=reducer)
    square = X.flip(1)

    def hand_written(x, columns, labels, without_diagonal=False):
        same = Y[:, None] == labels[None, :]
        pairs = ~torch.eye(*same.shape, dtype=torch.bool) if without_diagonal else True
        return listed_loss(x, columns, same & pairs, ~same)

    assert_same(lambda x: loss(x, Y, None, REF, REF_Y), lambda x: hand_written(x, REF, REF_Y))
    # The diagonal goes where the labels are the same tensor, as in lmu.get_all_pairs_indices.
    for ref_of, ref_labels in (
        (lambda x: x, Y),
        (lambda x: x, Y.clone()),
        (lambda x: square, Y),
        (lambda x: square, Y.clone()),
    ):
        assert_same(
            lambda x: loss(x, Y, None, ref_of(x), ref_labels),  # noqa: B023
            lambda x: hand_written(x, ref_of(x), ref_labels, ref_labels is Y),  # noqa: B023
        )
    with pytest.raises(ValueError, match="ref_emb was given without ref_labels"):
        loss(X, Y, ref_emb=REF)
    with pytest.raises(TypeError, match="labels is needed"):
        loss(X)


@pytest.mark.parametrize(
    "miner",
    [
        miners.MultiSimilarityMiner(),
        miners.TripletMarginMiner(type_of_triplets="semihard"),
        miners.BatchHardMiner(),
    ],
)
@pytest.mark.parametrize("reducer", [None, reducers.AvgNonZeroReducer()])
def test_miners(miner, reducer):
    loss = BSTripletLoss(reducer=reducer)
    core = bstriplet_kernels.BSTripletLoss()
    indices = miner(X, Y)
    assert_same(lambda x: loss(x, Y, indices), lambda x: core(x, Y, indices))
    assert_same(lambda x: loss(x, None, indices), lambda x: core(x, None, indices))
    indices = miner(X, Y, REF, REF_Y)
    assert_same(
        lambda x: loss(x, Y, indices, REF, REF_Y), lambda x: core(x, Y, indices, REF, REF_Y)
    )


@pytest.mark.parametrize("entries", [3, 4])
def test_where_a_miner_finds_nothing_the_loss_is_zero_and_attached(entries):
    value, gradient = value_and_gradient(
        lambda x: BSTripletLoss()(x, Y, tuple(NOTHING for _ in range(entries)))
    )
    assert value == 0
    assert torch.equal(gradient, torch.zeros_like(X))


def test_negatives_alone_count_against_an_empty_mean():
    _, _, anchors, negatives = lmu.get_all_pairs_indices(Y)
    indices = NOTHING, NOTHING, anchors, negatives
    other = Y[:, None] != Y[None, :]
    assert_same(
        lambda x: BSTripletLoss()(x, Y, indices),
        lambda x: listed_loss(x, x, torch.zeros_like(other), other),
    )


@pytest.mark.parametrize("impl", available_impls())
def test_an_impl_does_with_listed_pairs_what_it_does_in_the_core(impl):
    def outcome(loss):
        try:
            return loss(X, Y, lmu.get_all_pairs_indices(Y)).item()
        except ValueError as error:
            return str(error)

    ours = outcome(BSTripletLoss(impl=impl))
    assert ours == outcome(bstriplet_kernels.BSTripletLoss(impl=impl))


def test_labels_and_indices_are_moved_to_the_embeddings(monkeypatch):
    loss = BSTripletLoss()
    given = []

    def core(embeddings, labels, indices_tuple, ref_emb, ref_labels):
        given.extend((labels, *(indices_tuple or ()), ref_labels))
        return embeddings.sum()

    monkeypatch.setattr(loss.mean_loss, "forward", core)
    loss(X.to("meta"), Y, lmu.get_all_pairs_indices(Y))
    loss(X.to("meta"), Y, None, REF.to("meta"), REF_Y)
    devices = [tensor.device.type for tensor in given if tensor is not None]
    assert devices == ["meta"] * 7  # labels and four index tensors, then two label tensors


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("indices", [None, lmu.get_all_pairs_indices(Y)])
def test_labels_and_indices_of_the_cpu_with_embeddings_of_a_gpu(indices):
    loss = BSTripletLoss()
    torch.testing.assert_close(loss(X.cuda(), Y, indices).cpu(), loss(X, Y, indices))


def test_in_multiple_losses():
    both = losses.MultipleLosses(
        [BSTripletLoss(), losses.ContrastiveLoss()],
        miners=[miners.MultiSimilarityMiner(), None],
        weights=[2, 1],
    )
    indices = miners.MultiSimilarityMiner()(X, Y)
    core, contrastive = bstriplet_kernels.BSTripletLoss(), losses.ContrastiveLoss()
    assert_same(lambda x: both(x, Y), lambda x: 2 * core(x, Y, indices) + contrastive(x, Y))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "reducer", [None, reducers.AvgNonZeroReducer(), reducers.ClassWeightedReducer(CLASS_WEIGHTS)]
)
def test_half_precision_and_autocast_give_a_float32_loss(dtype, reducer):
    loss = BSTripletLoss(reducer=reducer)
    x = X.to(dtype)
    expected = loss(x.float(), Y)
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            value, gradient = value_and_gradient(lambda x: loss(x, Y), x)
            pairs = loss(x, Y, lmu.get_all_pairs_indices(Y))
        assert value.dtype == pairs.dtype == torch.float32
        assert gradient.dtype == dtype
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(pairs, expected)


@pytest.mark.parametrize("wrapper", [CrossBatchMemory, SelfSupervisedLoss])
def test_wrappers_admit_the_loss_and_what_the_library_admits(wrapper):
    theirs = wrapper.__mro__[1]
    keywords = {"embedding_size": 6} if wrapper is CrossBatchMemory else {}
    for loss in (BSTripletLoss(), bstriplet_kernels.BSTripletLoss(), losses.NTXentLoss()):
        assert wrapper(loss, **keywords).loss is loss
    with pytest.raises(Exception, match="not supported for ArcFaceLoss"):
        wrapper(losses.ArcFaceLoss(3, 6), **keywords)
    with pytest.raises(Exception, match="not supported for BSTripletLoss"):
        theirs(BSTripletLoss(), **keywords)


@pytest.mark.parametrize("sizes", [(8, 8, 8, 8), (1, 1, 5, 1), (20, 20), (3, 17, 20, 4)])
@pytest.mark.parametrize("loss", [BSTripletLoss(), bstriplet_kernels.BSTripletLoss()])
def test_cross_batch_memory_by_hand(loss, sizes):
    """Every row against the last 20, from which its own copy, and that alone, is left out."""
    memory = CrossBatchMemory(loss, embedding_size=6, memory_size=20)
    all_x, all_labels = batch(sum(sizes), 6, 3, 2, torch.float32)
    for step, (x, labels) in enumerate(shards(all_x, all_labels, sizes)):
        end = sum(sizes[: step + 1])
        queue = slice(max(0, end - 20), end)
        columns, same = all_x[queue].clone(), labels[:, None] == all_labels[queue]
        own_copies = torch.eye(len(columns), dtype=torch.bool)[-len(x) :]
        positive, negative = same & ~own_copies, ~same
        got = value_and_gradient(lambda x, labels=labels: memory(x, labels), x)
        pairs = columns, positive, negative
        expected = value_and_gradient(lambda x, pairs=pairs: listed_loss(x, *pairs), x)
        if type(loss) is BSTripletLoss and not (positive | negative).any():
            expected = torch.zeros_like(expected[0]), torch.zeros_like(x)
        torch.testing.assert_close(got, expected)


def test_cross_batch_memory_with_a_miner_and_a_mask():
    miner = miners.MultiSimilarityMiner()
    memory = CrossBatchMemory(BSTripletLoss(), embedding_size=6, memory_size=64, miner=miner)
    memory(REF, REF_Y)
    columns, labels = torch.cat((REF, X)), torch.cat((REF_Y, Y))
    anchors, positives, *negatives = miner(X, Y, columns, labels)
    keep = positives != anchors + len(REF)
    indices = anchors[keep], positives[keep], *negatives
    core = bstriplet_kernels.BSTripletLoss()
    torch.testing.assert_close(memory(X, Y), core(X, None, indices, columns, labels))

    triplets = CrossBatchMemory(
        BSTripletLoss(), embedding_size=6, memory_size=64, miner=miners.TripletMarginMiner(2)
    )
    anchors, positives, negatives = triplets.create_indices_tuple(
        *(X, Y, columns, labels), None, do_remove_self_comparisons=False
    )
    triplets(REF, REF_Y)
    keep = positives != anchors + len(REF)
    assert not keep.all()
    indices = tuple(index[keep] for index in (anchors, positives, negatives))
    torch.testing.assert_close(triplets(X, Y), core(X, None, indices, columns, labels))

    memory = CrossBatchMemory(BSTripletLoss(), embedding_size=6, memory_size=64)
    mask = torch.arange(len(X)) >= 12
    expected = bstriplet_loss(X[:12], Y[:12], ref_emb=X[12:], ref_labels=Y[12:])
    torch.testing.assert_close(memory(X, Y, enqueue_mask=mask), expected)


def test_cross_batch_memory_takes_half_rows_under_cuda_autocast():
    memory = CrossBatchMemory(BSTripletLoss(), embedding_size=6, memory_size=64)
    was_enabled = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)  # the library asks for this flag on any device
    try:
        value = memory(X.half(), Y.int())
    finally:
        torch.set_autocast_enabled("cuda", was_enabled)
    torch.testing.assert_close(value, bstriplet_loss(X.half(), Y))


@pytest.mark.parametrize("loss", [BSTripletLoss(), bstriplet_kernels.BSTripletLoss()])
def test_self_supervised_loss_by_hand(loss):
    other = X.flip(1)
    labels = torch.arange(len(X))
    assert_same(
        lambda x: SelfSupervisedLoss(loss)(x, other),
        lambda x: plain_loss(torch.cat((x, other)), torch.cat((labels, labels)), Formula()),
    )
    assert_same(
        lambda x: SelfSupervisedLoss(loss, symmetric=False)(x, other),
        lambda x: plain_loss(x, labels, Formula(), other, labels),
    )


def distributed_wrapper_is_one_process(rank, world):
    def network():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))

    alone = network()
    rows = bstriplet_loss(alone(X), Y, reduction="none")
    rows.mean().backward()
    x, labels = shards(X, Y, (10, 10))[rank]
    for loss in (BSTripletLoss(), BSTripletLoss(reducer=reducers.ThresholdReducer(low=-1))):
        parallel = torch.nn.parallel.DistributedDataParallel(network())
        value = pml_distributed.DistributedLossWrapper(loss)(parallel(x), labels)
        value.backward()
        torch.testing.assert_close(value, world * rows.mean())
        for ours, theirs in zip(parallel.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4)

    efficient = pml_distributed.DistributedLossWrapper(BSTripletLoss(), efficient=True)
    own = rows[10 * rank : 10 * (rank + 1)]
    torch.testing.assert_close(efficient(alone(x), labels), world * own.mean())

    memory = CrossBatchMemory(BSTripletLoss(), embedding_size=6, memory_size=64)
    value = pml_distributed.DistributedLossWrapper(memory)(x, labels)
    torch.testing.assert_close(value, world * bstriplet_loss(X, Y))


def test_distributed_wrapper_gives_loss_and_gradient_of_one_process():
    on_ranks(distributed_wrapper_is_one_process)


def test_without_the_library_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "bstriplet_kernels.metric_learning")
    monkeypatch.setitem(sys.modules, "pytorch_metric_learning", None)
    with pytest.raises(ImportError, match="pip install pytorch-metric-learning"):
        importlib.import_module("bstriplet_kernels.metric_learning")
