"""The loss of a global batch over processes equals one process's on the concatenated batch."""

import pytest
import torch
import torch.distributed as dist
from oracle import Formula, batch
from ranks import on_ranks, shards
from torch.fx.experimental.proxy_tensor import make_fx

from bstriplet_kernels import BSTripletLoss, CrossEntropyBSTripletLoss, bstriplet_loss

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


def equals_one_process(rank, world, splits=((7, 7, 7), (1, 12, 5), (0, 3, 9), (20, 1, 1))):
    for seed, sizes in enumerate(splits):
        for formula in (
            Formula(),
            Formula(similarity="signed_square", reduction="sum", eq3="printed"),
            Formula(0.5, similarity="linear"),
            Formula(reduction="none", margin=0.5),
        ):
            x, labels = batch(sum(sizes), 6, 3, seed)
            labels = labels.sort().values  # ranks that hold one class
            whole = x.clone().requires_grad_()
            expected, stats = bstriplet_loss(whole, labels, return_stats=True, **formula.keywords)
            upstream = torch.rand(expected.shape, dtype=torch.float64) + 0.5
            dist.broadcast(upstream, 0)
            expected.backward(upstream)
            own_x, own_labels = shards(x, labels, sizes)[rank]
            own_x = own_x.clone().requires_grad_()
            got, got_stats = bstriplet_loss(
                own_x, own_labels, group=dist.group.WORLD, return_stats=True, **formula.keywords
            )
            per_row = formula.reduction == "none"
            own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
            torch.testing.assert_close(got, expected[own] if per_row else expected)
            got.backward(upstream[own] if per_row else upstream)
            torch.testing.assert_close(
                own_x.grad, whole.grad[own] * (1 if per_row else world), atol=1e-12, rtol=1e-9
            )
            for a, b in zip(got_stats, stats, strict=True):
                torch.testing.assert_close(a, b)


def ddp_gets_the_one_process_gradient(rank, world):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    alone = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    alone.load_state_dict(model.state_dict())
    x, labels = batch(17, 5, 3, 3, torch.float32)
    expected = BSTripletLoss()(alone(x), labels)
    expected.backward()
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    own_x, own_labels = shards(x, labels, (12, 5))[rank]
    loss = BSTripletLoss(group=dist.group.WORLD)(parallel(own_x), own_labels)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4)


def errors_are_clear(rank, world):
    x, labels = batch(4, 5, 3, rank, torch.float32)
    group = dist.group.WORLD
    with pytest.raises(ValueError, match=r"global batch has 1 row\(s\) over 2 ranks.*drop_last"):
        bstriplet_loss(x[: 1 - rank], labels[: 1 - rank], group=group)
    for own, found in (
        (x[:, : 3 + rank], "3 of torch.float32, 4 of torch.float32"),
        (x.to((torch.float32, torch.bfloat16)[rank]), "5 of torch.float32, 5 of torch.bfloat16"),
    ):
        message = f"same number of columns and dtype on every rank, got by rank {found}"
        with pytest.raises(ValueError, match=message):
            bstriplet_loss(own, labels, group=group)
    for module in (BSTripletLoss, CrossEntropyBSTripletLoss):
        with pytest.raises(ValueError, match="impl='gram' cannot be combined with group"):
            module(impl="gram", group=group)
    with pytest.raises(ValueError, match="impl='reference' cannot be combined with group"):
        bstriplet_loss(x, labels, impl="reference", group=group)
    with pytest.raises(ValueError, match="group and ref_emb were both given"):
        bstriplet_loss(x, labels, ref_emb=x, ref_labels=labels, group=group)
    with pytest.raises(ValueError, match="indices_tuple cannot be given together with group"):
        BSTripletLoss(group=group)(x, labels, (labels, labels, labels))
    loss = bstriplet_loss(x.requires_grad_(), labels, group=group)
    with pytest.raises(RuntimeError, match="no second derivative with group"):
        torch.autograd.grad(loss, x, create_graph=True)


def small_panels_give_the_same(rank, world):
    import bstriplet_kernels.distributed as module

    x, labels = batch(11, 5, 3, rank)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    losses = []
    for leaf, module._PANEL_ELEMENTS in zip(leaves, (1 << 24, 60), strict=True):
        losses.append(bstriplet_loss(leaf, labels, group=dist.group.WORLD))
        losses[-1].backward()
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*[leaf.grad for leaf in leaves])


def what_would_lose_the_gradient_is_refused(rank, world):
    x, labels = batch(6, 5, 3, rank)

    def loss(x):
        return bstriplet_loss(x, labels, group=dist.group.WORLD)

    def traced(x):
        return make_fx(loss)(x)

    def exported(x):
        return torch.export.export(Holder(loss), (x,))

    def jit_traced(x):
        return torch.jit.trace(loss, (x,))

    def dual(x):
        with torch.autograd.forward_ad.dual_level():
            return loss(torch.autograd.forward_ad.make_dual(x, x))

    transforms = (torch.func.grad(loss), torch.func.jacfwd(loss), torch.vmap(loss))
    for run in (traced, exported, jit_traced, dual, *transforms):
        with pytest.raises(RuntimeError, match="group cannot be used under"):
            run(x[None] if run is transforms[-1] else x)
    with pytest.raises(RuntimeError, match="group cannot be used"):
        bstriplet_loss(x.to("meta"), labels.to("meta"), group=dist.group.WORLD)


class Holder(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.forward = function


def compiled_is_eager(rank, world):
    x, labels = batch(6, 5, 3, rank)

    def gradient(run):
        leaf = x.clone().requires_grad_()
        run(leaf * 1).backward()
        return leaf.grad

    def loss(x):
        return bstriplet_loss(x, labels, group=dist.group.WORLD)

    torch.testing.assert_close(gradient(torch.compile(loss, backend="eager")), gradient(loss))


def shards_of_a_dtensor(rank, world):
    """A DTensor is refused, and both ways out that the message names give the right gradient."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world,))
    x, labels = batch(8, 5, 3, 0)
    expected = x.clone().requires_grad_()
    bstriplet_loss(expected, labels).backward()
    parts, own = (distribute_tensor(t, mesh, [Shard(0)]) for t in (x, labels))
    parts.requires_grad_()
    with pytest.raises(TypeError, match=r"embeddings is a DTensor.*full_tensor\(\).*to_local\(\)"):
        bstriplet_loss(parts, own)
    with pytest.raises(TypeError, match="labels is a DTensor"):
        bstriplet_loss(parts.to_local(), own)
    bstriplet_loss(parts.full_tensor(), own.full_tensor()).backward()
    torch.testing.assert_close(parts.grad.full_tensor(), expected.grad)
    parts.grad = None
    bstriplet_loss(parts.to_local(), own.to_local(), group=mesh.get_group()).backward()
    torch.testing.assert_close(parts.grad.full_tensor(), world * expected.grad)


def two_rank_bodies(rank, world):
    for body in (
        ddp_gets_the_one_process_gradient,
        errors_are_clear,
        small_panels_give_the_same,
        what_would_lose_the_gradient_is_refused,
        compiled_is_eager,
        shards_of_a_dtensor,
    ):
        body(rank, world)


def test_loss_gradient_and_statistics_equal_one_process_on_three_ranks():
    on_ranks(equals_one_process, world=3)


def test_data_parallel_errors_and_panels_on_two_ranks():
    on_ranks(two_rank_bodies, world=2)


def test_a_rank_outside_the_group_makes_the_module_and_may_not_call_it():
    criterion = BSTripletLoss(group=dist.GroupMember.NON_GROUP_MEMBER)
    with pytest.raises(ValueError, match="this rank is not in group"):
        criterion(*batch(4, 5, 3, 0))


def test_a_group_of_one_is_no_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        equals_one_process(0, 1, splits=((9,), (30,)))
        x, labels = batch(4, 5, 3, 0)
        loss = bstriplet_loss(x.requires_grad_(), labels, group=dist.group.WORLD)
        with pytest.raises(RuntimeError, match="no second derivative with group"):
            torch.autograd.grad(loss, x, create_graph=True)
    finally:
        dist.destroy_process_group()
