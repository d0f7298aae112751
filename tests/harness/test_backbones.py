"""The backbones: equal to torchvision's and pytorchcv's, and complete timm models."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from bstriplet.errors import UserError
from bstriplet.models.classifier import Classifier, check_backbone, pad_depthwise
from bstriplet.models.peleenet import DenseLayer
from bstriplet.models.shufflenet import Unit, interleave
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import DropPath
from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn import functional as F

WIDTHS = ("x0_5", "x1_0", "x1_5", "x2_0")
TABLE_1 = ("efficientnet_b1", "mobilenetv3_small_100", "shufflenet_v2", "peleenet")
MODELS = ("shufflenet_v2_x0_5", "peleenet")
FEATURES = {
    "shufflenet_v2": [24, 232, 464, 928],
    "shufflenet_v2_x0_5": [24, 48, 96, 192],
    "peleenet": [128, 256, 512, 704],
}

both = pytest.mark.parametrize("name", MODELS)


def create(name: str, **options: object) -> nn.Module:
    """Build a model for grey images and three classes, without any symmetry, in float64."""
    torch.manual_seed(0)
    model = timm.create_model(name, **({"num_classes": 3, "in_chans": 1} | options))
    return disturb(model).double().eval()


def disturb(model: nn.Module) -> nn.Module:
    """Give every normalisation random weights and statistics, as after training."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            channel = torch.arange(module.num_features)
            module.weight.data = 1 + 0.3 * torch.cos(channel)
            module.bias.data = 0.1 * torch.sin(2 * channel)
            module.running_mean = 0.1 * torch.sin(3 * channel)
            module.running_var = 1 + 0.3 * torch.cos(5 * channel)
    return model


def images(*shape: int) -> Tensor:
    """Return float64 images."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    """Compare relative to the largest number."""
    assert theirs.abs().max() > 0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9 * theirs.abs().max().item())


def torchvision_pair(width: str, folder: Path) -> tuple[nn.Module, nn.Module]:
    """Return torchvision's network with random weights, and ours with the same ones from a file."""
    theirs = disturb(getattr(torchvision.models, f"shufflenet_v2_{width}")())
    torch.save(theirs.state_dict(), folder / "weights.pth")
    ours = timm.create_model(
        f"shufflenet_v2_{width}",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(folder / "weights.pth")},
    )
    return ours.double().eval(), theirs.double().eval()


@pytest.mark.parametrize("width", WIDTHS)
def test_shufflenet_with_torchvisions_weights_is_torchvisions(width: str, tmp_path: Path) -> None:
    ours, theirs = torchvision_pair(width, tmp_path)
    with torch.no_grad():
        for height, breadth in ((128, 128), (97, 61)):
            x = images(2, 3, height, breadth)
            assert_same(ours(x), theirs(x))


def test_shufflenet_trains_as_torchvisions_does(tmp_path: Path) -> None:
    ours, theirs = torchvision_pair("x0_5", tmp_path)
    x = images(4, 3, 64, 64)
    for model in (ours, theirs):
        model.train()
        F.cross_entropy(model(x), torch.tensor([1, 5, 7, 1])).backward()
    for mine, its in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_same(mine.grad, its.grad)
    for mine, its in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert_same(mine.double(), its.double())


@pytest.mark.parametrize("width", WIDTHS)
def test_shufflenet_has_as_many_parameters_as_torchvision_says(width: str) -> None:
    weights = getattr(torchvision.models, f"ShuffleNet_V2_{width.upper()}_Weights").IMAGENET1K_V1
    model = timm.create_model(f"shufflenet_v2_{width}")
    assert sum(p.numel() for p in model.parameters()) == weights.meta["num_params"]
    assert model.pretrained_cfg["url"] == weights.url


def test_colour_weights_serve_grey_images(tmp_path: Path) -> None:
    colour, _ = torchvision_pair("x0_5", tmp_path)
    grey = timm.create_model(
        "shufflenet_v2_x0_5",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "weights.pth")},
        in_chans=1,
        num_classes=3,
    )
    grey = grey.double().eval()
    x = images(2, 1, 64, 64)
    assert_same(grey.forward_features(x), colour.forward_features(x.expand(-1, 3, -1, -1)))
    assert grey(x).shape == (2, 3)


def test_own_weights_load_as_pretrained_ones(tmp_path: Path) -> None:
    saved = create("shufflenet_v2_x0_5", in_chans=3)
    torch.save(saved.state_dict(), tmp_path / "own.pth")
    overlay = {"file": str(tmp_path / "own.pth"), "num_classes": 3}
    loaded = timm.create_model(
        "shufflenet_v2_x0_5", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3
    )
    x = images(1, 3, 64, 64)
    torch.testing.assert_close(loaded.double().eval()(x), saved(x), rtol=1e-5, atol=1e-5)


def test_peleenet_with_pytorchcvs_weights_is_pytorchcvs() -> None:
    peleenet = pytest.importorskip("pytorchcv.models.peleenet").peleenet
    theirs = disturb(peleenet(num_classes=3, in_channels=1)).double().eval()
    ours = create("peleenet")
    ours.load_state_dict(
        dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)), strict=True
    )
    x = images(1, 1, 224, 224)
    with torch.no_grad():
        assert_same(ours(x), theirs(x))
        x = images(2, 1, 96, 160)
        assert_same(ours.forward_features(x), theirs.features[:-1](x))


def test_peleenet_has_the_parameters_of_both_papers() -> None:
    model = timm.create_model("peleenet")
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(2.8e6, abs=5e4)
    model = timm.create_model("peleenet", num_classes=3, in_chans=1)
    statistics = (b.numel() for name, b in model.named_buffers() if "running" in name)
    count = sum(p.numel() for p in model.parameters()) + sum(statistics)
    assert count == pytest.approx(2.11e6, abs=5e3)


@settings(max_examples=30, derandomize=True, deadline=None)
@given(
    shape=st.tuples(*(st.integers(1, 5) for _ in range(4))),
    layout=st.sampled_from([torch.contiguous_format, torch.channels_last]),
)
def test_interleaving_is_a_channel_shuffle(
    shape: tuple[int, ...], layout: torch.memory_format
) -> None:
    left, right = (images(2, *shape)[i].contiguous(memory_format=layout) for i in range(2))
    mixed = interleave(left, right)
    assert torch.equal(mixed, F.channel_shuffle(torch.cat((left, right), dim=1), 2))
    is_told_apart = shape[1] > 1 and shape[2] * shape[3] > 1
    assert mixed.is_contiguous(memory_format=layout) or not is_told_apart


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_are_made_where_and_as_asked(name: str, dtype: torch.dtype) -> None:
    model = timm.create_model(name, num_classes=3, device="meta", dtype=dtype)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", dtype)}
    assert {b.device.type for b in model.buffers()} == {"meta"}
    model = timm.create_model(name, num_classes=3, in_chans=1, dtype=dtype).eval()
    x = images(2, 1, 32, 32).to(dtype)
    logits = model(x)
    assert logits.dtype == dtype
    assert torch.equal(logits, model(x))
    assert logits.isfinite().all()


@both
def test_an_image_alone_is_classified_as_in_a_batch(name: str) -> None:
    for channels in (2, 4):
        model = create(name, in_chans=channels)
        x = images(3, channels, 40, 64)
        assert_same(model(x[1:2]), model(x)[1:2])


@settings(max_examples=15, derandomize=True, deadline=None)
@given(name=st.sampled_from(MODELS), height=st.integers(1, 90), width=st.integers(1, 90))
def test_any_image_size_works(name: str, height: int, width: int) -> None:
    model = create(name).float()
    with torch.no_grad():
        features = model.forward_features(images(1, 1, height, width).float())
    expected = (1, model.num_features, math.ceil(height / 32), math.ceil(width / 32))
    assert features.shape == expected
    assert features.isfinite().all()


def test_a_network_with_two_classifiers_is_refused() -> None:
    with pytest.raises(UserError, match="deit_tiny_distilled_patch16_224 has no linear classifier"):
        Classifier("deit_tiny_distilled_patch16_224", num_classes=3, channels=1)


@pytest.mark.parametrize(
    ("name", "image_size", "message"),
    [
        ("efficientvit_m0", 224, "the logits of efficientvit_m0 are not its linear classifier's"),
        ("halonet_h1", 32, r"halonet_h1 fails on images of 32 x 32 pixels \(AssertionError\)"),
        ("resnet18.a1_in1k", 64, r"asks for pretrained weights \('a1_in1k'\), .* give resnet18$"),
        ("shufflenet_v2.none", 64, "asks for pretrained weights .* give shufflenet_v2$"),
    ],
    ids=["norm in the head", "size", "weights", "no such weights"],
)
def test_a_backbone_that_cannot_be_what_a_run_says_is_refused(
    name: str, image_size: int, message: str
) -> None:
    with pytest.raises(UserError, match=rf"^--backbone: .*{message}"):
        check_backbone(name, image_size)


@pytest.mark.parametrize("name", ["test_vit", *TABLE_1])
def test_checking_a_backbone_draws_no_random_numbers(name: str) -> None:
    state = torch.get_rng_state()
    check_backbone(name, 160)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 3, 32, 32),
        torch.zeros(2, 1, 32, 32, dtype=torch.uint8),
        torch.zeros(3, 32, 32, dtype=torch.uint8),
    ],
    ids=["from 0 to 1", "grey", "one"],
)
def test_images_of_another_kind_than_trained_on_are_refused(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"images must be uint8 \[N, 3, H, W\], .*; these are"):
        Classifier("mobilenetv3_small_050", 2, 3)(images)


def test_an_unknown_embedding_is_refused() -> None:
    with pytest.raises(UserError, match="unknown name 'pool'; did you mean 'pooled'"):
        Classifier("mobilenetv3_small_050", 2, 3, embedding="pool")


@pytest.mark.parametrize("channels_last", [False, True])
def test_networks_with_filters_in_3d_are_built_in_either_layout(channels_last: bool) -> None:
    model = Classifier("lambda_resnet26t", 2, 1, channels_last=channels_last)
    filters = model.backbone.stem.conv2.conv.weight
    assert filters.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert {parameter.ndim for parameter in model.parameters()} == {1, 2, 4, 5}


@both
@pytest.mark.parametrize("channels", [1, 3])
def test_logits_are_the_classifier_of_the_embedding(name: str, channels: int) -> None:
    model = create(name, in_chans=channels)
    x = images(2, channels, 64, 64)
    embedding = model.forward_head(model.forward_features(x), pre_logits=True)
    assert embedding.shape == (2, model.num_features) == (2, model.head_hidden_size)
    assert_same(embedding, model.forward_features(x).mean((2, 3)))
    assert_same(model(x), model.get_classifier()(embedding))


@both
def test_the_classifier_can_be_replaced_and_removed(name: str) -> None:
    model = create(name)
    x = images(2, 1, 64, 64)
    embedding = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(7)
    model.double()
    assert (model.num_classes, tuple(model(x).shape)) == (7, (2, 7))
    model.reset_classifier(5, "catavgmax")
    model.double()
    assert model.head_hidden_size == 2 * model.num_features
    assert model(x).shape == (2, 5)
    model.reset_classifier(0, "avg")
    assert_same(model(x), embedding)
    model.reset_classifier(0, "")
    assert model(x).shape == (2, model.num_features, 2, 2)


@both
def test_options_reach_the_head(name: str) -> None:
    model = create(name, drop_rate=0.5, global_pool="max")
    x = images(2, 1, 64, 64)
    features = model.forward_features(x)
    assert_same(model.forward_head(features, pre_logits=True), features.amax((2, 3)))
    model.head.train()
    dropped = model.forward_head(features, pre_logits=True) == 0
    assert 0.3 < dropped.double().mean() < 0.7


def drop_paths(model: nn.Module) -> dict[str, float]:
    """Return the rates of a model by the names of the modules that drop."""
    modules = model.named_modules()
    return {name: module.drop_prob for name, module in modules if isinstance(module, DropPath)}


def test_drop_path_rises_over_the_units_but_spares_those_that_halve() -> None:
    rates = torch.linspace(0, 0.3, 16).tolist()
    units = [(stage, unit) for stage, count in enumerate((4, 8, 4)) for unit in range(count)]
    expected = {
        f"stages.{stage}.{unit}.right.3": rate
        for (stage, unit), rate in zip(units, rates, strict=True)
        if unit
    }
    assert drop_paths(create("shufflenet_v2_x0_5", drop_path_rate=0.3)) == pytest.approx(expected)

    rates = torch.linspace(0, 0.3, 21).tolist()
    layers = [
        f"stages.{stage}.{layer + bool(stage)}"
        for stage, count in enumerate((3, 4, 8, 6))
        for layer in range(count)
    ]
    expected = {
        f"{layer}.{way}": rate
        for layer, rate in zip(layers[1:], rates[1:], strict=True)
        for way in ("near.2", "far.3")
    }
    assert drop_paths(create("peleenet", drop_path_rate=0.3)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("make", "branches"),
    [
        (lambda rate: Unit(16, rate), [slice(1, None, 2)]),
        (lambda rate: DenseLayer(16, 1, rate), [slice(16, 32), slice(32, 48)]),
    ],
)
def test_in_training_a_unit_adds_nothing_to_a_share_of_the_images(
    make: Callable[[float], nn.Module], branches: list[slice]
) -> None:
    torch.manual_seed(0)
    unit = disturb(make(0.6)).double().eval()
    x = images(500, 16, 3, 3)
    complete = unit(x)
    for module in unit.modules():
        module.train(isinstance(module, DropPath))
    dropping = unit(x)
    passing = torch.ones(complete.shape[1], dtype=torch.bool)
    for channels in branches:
        passing[channels] = False
        kept = dropping[:, channels].flatten(1).any(dim=1)
        assert 0.3 < kept.double().mean() < 0.5
        assert_same(dropping[kept][:, channels], complete[kept][:, channels] / 0.4)
    assert torch.equal(dropping[:, passing], complete[:, passing])


@both
def test_drop_path_changes_neither_weights_nor_predictions(name: str) -> None:
    plain, dropping = create(name), create(name, drop_path_rate=0.3)
    assert str(create(name, drop_path_rate=0.0)) == str(plain) != str(dropping)
    dropping.load_state_dict(plain.state_dict(), strict=True)
    x = images(4, 1, 64, 64)
    assert torch.equal(dropping(x), plain(x))
    dropping.train()
    assert not torch.equal(dropping(x), dropping(x))


@both
@pytest.mark.parametrize("features_only", [False, True])
def test_batch_norm_options_reach_every_norm(name: str, features_only: bool) -> None:
    model = create(name, bn_momentum=0.05, bn_eps=1e-4, features_only=features_only)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(norm.momentum, norm.eps) for norm in norms} == {(0.05, 1e-4)}
    norms = [module for module in create(name).modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(norm.momentum, norm.eps) for norm in norms} == {(0.1, 1e-5)}


@both
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("drop_path_rate", -0.1),
        ("drop_path_rate", 1.0),
        ("drop_path_rate", math.nan),
        ("bn_momentum", -0.1),
        ("bn_momentum", 1.5),
        ("bn_eps", 0.0),
        ("bn_eps", math.inf),
    ],
)
def test_an_option_out_of_range_is_named(name: str, option: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{option}={value}: give a"):
        timm.create_model(name, **{option: value})


@both
@pytest.mark.parametrize("option", ["drop_block_rate", "head_init_scale", "head_init_bias"])
def test_an_option_that_the_networks_lack_is_named(name: str, option: str) -> None:
    with pytest.raises(TypeError, match=option):
        timm.create_model(name, **{option: 0.1})


@both
@pytest.mark.parametrize("coarse", [False, True])
def test_parameters_are_grouped_from_stem_to_head(name: str, coarse: bool) -> None:
    model = create(name)
    groups = group_parameters(model, model.group_matcher(coarse), reverse=True)
    assert set(groups) == {parameter for parameter, _ in model.named_parameters()}
    layers = [groups[parameter] for parameter, _ in model.named_parameters()]
    assert layers == sorted(layers)
    stages = len(model.stages) if coarse else sum(len(stage) for stage in model.stages)
    assert len(set(layers)) == 1 + stages + 1  # the last convolution goes with the last of them


def kept_for_backward(run: Callable[[], Any]) -> tuple[int, Any]:
    """Return the result of a computation and the number of tensors it keeps for its backward."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        result = run()
    return len(kept), result


@both
@pytest.mark.parametrize("drop_path_rate", [0.0, 0.2])
def test_checkpointing_changes_no_gradient(name: str, drop_path_rate: float) -> None:
    model = create(name, drop_path_rate=drop_path_rate).train()
    x = images(4, 1, 48, 48)
    torch.manual_seed(0)
    plain = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    model.set_grad_checkpointing()
    torch.manual_seed(0)
    kept, loss = kept_for_backward(lambda: model(x).square().sum())
    again = torch.autograd.grad(loss, list(model.parameters()))
    for one, other in zip(again, plain, strict=True):
        assert_same(one, other)
    model.set_grad_checkpointing(False)
    assert kept < kept_for_backward(lambda: model(x))[0] / 2


@both
def test_maps_in_between_are_checkpointed_too(name: str) -> None:
    model = create(name)
    x = images(2, 1, 48, 48)
    plain, (_, expected) = kept_for_backward(lambda: model.forward_intermediates(x))
    model.set_grad_checkpointing()
    kept, (_, maps) = kept_for_backward(lambda: model.forward_intermediates(x))
    assert kept < plain / 2
    for mine, its in zip(maps, expected, strict=True):
        assert_same(mine, its)


@pytest.mark.parametrize("name", FEATURES)
def test_features_come_at_four_resolutions(name: str) -> None:
    model = timm.create_model(name, features_only=True, in_chans=1).eval()
    assert model.feature_info.channels() == FEATURES[name]
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    with torch.no_grad():
        maps = model(images(1, 1, 65, 128).float())
    for level, channels, stride in zip(maps, FEATURES[name], (4, 8, 16, 32), strict=True):
        assert level.shape == (1, channels, math.ceil(65 / stride), 128 // stride)


@both
@pytest.mark.filterwarnings("ignore:NOTE. The nodes obtained by tracing:UserWarning")
@pytest.mark.parametrize("extractor", ["getter", "hook", "fx"])
def test_every_way_of_extraction_gives_the_same_maps(name: str, extractor: str) -> None:
    source = create(name)
    options = {"features_only": True, "feature_cls": extractor, "out_indices": (0, 2)}
    model = create(name, drop_path_rate=0.4, **options)
    x = images(1, 1, 64, 64)
    expected = source.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
    for mine, its in zip(model(x), expected, strict=True):
        assert_same(mine, its)


@both
def test_intermediates_come_beside_the_features(name: str) -> None:
    model = create(name)
    x = images(1, 1, 64, 64)
    features, every = model.forward_intermediates(x)
    assert_same(features, model.forward_features(x))
    early, maps = model.forward_intermediates(x, indices=[1, -4], stop_early=True)
    assert early is maps[-1]
    assert len(maps) == 2
    for mine, its in zip(maps, every, strict=False):
        assert_same(mine, its)
    last = model.forward_intermediates(x, indices=1, intermediates_only=True)
    assert_same(last[0], every[-1])


@both
def test_pruned_models_keep_what_their_maps_need(name: str) -> None:
    model, whole = create(name), create(name)
    x = images(1, 1, 64, 64)
    assert model.prune_intermediate_layers([0, -3]) == [0, 1]
    assert_same(
        model.forward_intermediates(x, [1], intermediates_only=True)[0],
        whole.forward_intermediates(x, [1], intermediates_only=True)[0],
    )
    assert model(x).shape == (1, model.num_features, 8, 8)
    assert whole.prune_intermediate_layers(1, prune_head=False) == [3]
    assert_same(whole(x), create(name)(x))


@both
def test_pruning_leaves_the_mode_as_it_is(name: str) -> None:
    x = images(1, 1, 64, 64)
    model = create(name, drop_rate=0.5, drop_path_rate=0.5)
    model.prune_intermediate_layers(3)
    assert torch.equal(model(x), model(x))
    model.train()
    model.prune_intermediate_layers(1)
    assert all(module.training for module in model.modules())


@both
@pytest.mark.parametrize("indices", [5, 0, [4], [-5], []])
def test_a_map_that_is_not_there_is_named(name: str, indices: int | list[int]) -> None:
    with pytest.raises(ValueError, match=r"indices=.* there are 4 feature maps"):
        create(name).forward_intermediates(images(1, 1, 32, 32), indices)


@both
def test_channels_last_is_kept_to_the_end(name: str) -> None:
    model = create(name).float()
    x = images(2, 1, 65, 65).float()
    expected = model(x)
    model.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    kept = []
    for module in model.modules():
        module.register_forward_hook(lambda module, inputs, output: kept.append((module, output)))
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    maps = [(module, output) for module, output in kept if output.ndim == 4]
    assert all(output.is_contiguous(memory_format=torch.channels_last) for _, output in maps)


def test_compiles_in_one_graph() -> None:
    """The backward too; that PeleeNet is traced whole its export shows."""
    model = create("shufflenet_v2_x0_5", drop_path_rate=0.4).train()
    x = images(2, 1, 64, 64)
    torch.manual_seed(0)
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.manual_seed(0)
    found = torch.autograd.grad(compiled(x).square().sum(), list(model.parameters()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", TABLE_1)
def test_classifiers_export_for_any_batch(name: str) -> None:
    """The model of a run, from uint8 images to logits and embeddings, for all four backbones."""
    model = Classifier(name, num_classes=3, channels=1).eval()
    disturb(model)
    model.standardise_with(torch.tensor([100.0]), torch.tensor([50.0]))
    few, many = (torch.randint(0, 256, (n, 1, 64, 64), dtype=torch.uint8) for n in (2, 5))
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (few,), dynamic_shapes={"images": {0: batch}})
    for found, expected in zip(program.module()(many), model(many), strict=True):
        torch.testing.assert_close(found, expected)


@both
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:The TorchScript type system:UserWarning")
def test_scripts(name: str) -> None:
    model = create(name, drop_path_rate=0.4)
    x = images(2, 1, 65, 64)
    for mode in (model.eval(), model.train()):
        scripted = torch.jit.script(mode)
        torch.manual_seed(0)
        expected = mode(x)
        torch.manual_seed(0)
        assert_same(scripted(x), expected)


@both
def test_state_dicts_load_without_pickle(name: str, tmp_path: Path) -> None:
    model = create(name)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = timm.create_model(name, num_classes=3, in_chans=1).double().eval()
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    x = images(1, 1, 64, 64)
    assert_same(other(x), model(x))


@both
def test_learns_a_few_images_by_heart(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, in_chans=1)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    x, labels = torch.randn(9, 1, 32, 32), torch.arange(9) % 3
    losses = []
    for _ in range(10):
        loss = F.cross_entropy(model(x), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 5


def test_the_default_shufflenet_is_table_1s() -> None:
    model = timm.create_model("shufflenet_v2", num_classes=3, in_chans=1)
    assert [info["num_chs"] for info in model.feature_info[1:]] == [232, 464, 928]
    assert model.num_features == 1024
    assert set(timm.list_models("shufflenet_v2*")) == {
        "shufflenet_v2",
        *(f"shufflenet_v2_{width}" for width in WIDTHS),
    }


@pytest.mark.parametrize("name", ["mobilenetv3_small_100", "efficientnet_b1", "shufflenet_v2"])
def test_padding_first_changes_no_output_and_no_gradient(name: str) -> None:
    torch.manual_seed(0)
    plain = Classifier(name, 3, 3)
    padded = copy.deepcopy(plain)
    pad_depthwise(padded)
    assert padded.state_dict().keys() == plain.state_dict().keys()
    changed = [m for m in padded.modules() if isinstance(m, nn.Conv2d) and m._forward_pre_hooks]
    assert len(changed) == {"mobilenetv3_small_100": 8, "efficientnet_b1": 12}.get(name, 0)
    images = torch.randint(0, 256, (4, 3, 40, 40), dtype=torch.uint8)
    for model in (plain, padded):
        model.double().standardise_with(torch.full((3,), 128.0), torch.full((3,), 64.0))
        model.zero_grad()
        model.eval()  # statistics of four images would magnify the last bits
        model(images).logits.sum().backward()
    for one, other in zip(plain.parameters(), padded.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
