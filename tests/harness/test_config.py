"""The configuration: section 3.1 by default; command line, file and object agree."""

import argparse
import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
from bstriplet import loss_registry
from bstriplet.config import (
    AUGMENT_KINDS,
    BATCHES,
    PAPER,
    RECIPES,
    STRONG,
    Scheme,
    TrainConfig,
    add_options,
    describe_difference,
    given_options,
    with_recipe,
)
from bstriplet.errors import UserError
from bstriplet.loss_registry import BUILT_IN
from hypothesis import given, settings
from hypothesis import strategies as st

configurations = st.builds(
    TrainConfig,
    data=st.sampled_from(["digits", "some/folder", "/a b/ü"]),
    image_size=st.integers(8, 300),
    train_per_class=st.integers(0, 100),
    validation=st.sampled_from(["train", "test"]),
    validation_fraction=st.floats(0.01, 0.5),
    skip_broken=st.booleans(),
    loss=st.sampled_from(list(BUILT_IN)),
    metric_weight=st.floats(0, 1e3),
    margin=st.floats(0, 1),
    batches=st.sampled_from(BATCHES),
    batch_size=st.integers(2, 5000),
    lr=st.floats(1e-8, 1),
    epochs=st.integers(1, 1000),
    seed=st.integers(0, 2**31 - 1),
    amp=st.booleans(),
    channels_last=st.booleans(),
    augment=st.sampled_from(["none", "copies", "online", "shifts"])
    | st.lists(st.sampled_from(AUGMENT_KINDS), min_size=1, unique=True).map("+".join),
    select=st.sampled_from(["last", "ce", "accuracy", "loss"]),
    similarity=st.sampled_from(["square", "signed_square", "linear"]),
    eq3=st.sampled_from(["corrected", "printed"]),
    stop_patience=st.integers(0, 50),
    optimiser=st.sampled_from(["adam", "adamw", "sgd"]),
    ema=st.floats(0, 0.999),
)


def parsed(words: list[str]) -> TrainConfig:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return TrainConfig(**given_options(parser.parse_args(words)))


def words_of(config: TrainConfig) -> list[str]:
    words = []
    for name, value in config.to_dict().items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words += [flag if value else flag.replace("--", "--no-", 1)]
        else:
            words.append(f"{flag}={value!r}" if isinstance(value, float) else f"{flag}={value}")
    return words


@given(configurations)
@settings(derandomize=True, deadline=None)
def test_file_and_command_line_give_the_configuration_back(config: TrainConfig) -> None:
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict())), Path("a")) == config
    assert parsed(words_of(config)) == config


def test_defaults_are_section_3_1_of_the_paper() -> None:
    config = TrainConfig(data="folder")
    assert config.image_size == 128
    assert (config.lr, config.lr_patience, config.lr_factor, config.lr_floor) == (
        1e-3, 20, 0.3, 1e-8,
    )  # fmt: skip
    assert (config.epochs, config.stop_patience, config.stop_delta) == (400, 30, 1e-4)
    assert (config.batch_size, config.metric_weight) == (36, 1.0)
    assert config.validation == "train"
    assert (config.optimiser, config.schedule, config.weight_decay) == ("adam", "plateau", 0)
    assert (config.augment, config.amp, config.ema) == ("none", False, 0)
    assert (config.select, config.similarity, config.eq3) == ("last", "square", "corrected")
    assert (config.class_weights, config.label_smoothing) == ("none", 0)
    assert config.clip_grad == 0
    assert config == parsed(["--data", "folder"])


def test_recipes_set_the_same_fields_and_what_is_given_comes_first() -> None:
    assert set(RECIPES) == {PAPER, STRONG}
    assert RECIPES[PAPER].keys() == RECIPES[STRONG].keys()
    assert TrainConfig(**with_recipe(PAPER, {})) == TrainConfig()
    assert with_recipe(PAPER, {"epochs": 3}) == {**RECIPES[PAPER], "epochs": 3}
    typed = {"data": "folder", "lr": 0.5, "batch_size": 6}
    strong = TrainConfig(**with_recipe(STRONG, typed))
    assert strong == TrainConfig(**{**RECIPES[STRONG], **typed})
    with pytest.raises(UserError, match=r"--recipe: .*'stong'; did you mean 'strong'\?"):
        with_recipe("stong", {})


def test_digits_are_not_flipped() -> None:
    for typed in ({}, {"data": "digits"}):
        assert with_recipe(STRONG, typed)["augment"] == "shifts+rotations+scales+brightness"
    assert with_recipe(STRONG, {"augment": "flips"})["augment"] == "flips"
    assert with_recipe(STRONG, {"data": "cells"})["augment"].startswith("flips+shifts")
    assert with_recipe(PAPER, {})["augment"] == "none"


@pytest.mark.parametrize(("epochs", "warm_up"), [(1, 0), (7, 0), (8, 1), (40, 5), (200, 25)])
def test_the_strong_recipe_warms_up_for_an_eighth_of_the_epochs(epochs: int, warm_up: int) -> None:
    config = TrainConfig(**with_recipe(STRONG, {"epochs": epochs}))
    assert (config.epochs, config.warm_up) == (epochs, warm_up)
    assert replace(config, epochs=16).warm_up == 2
    assert replace(config, warmup_epochs=0).warm_up == 0
    assert TrainConfig().warm_up == 0


def test_help_names_the_default_of_each_recipe() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser)
    text = " ".join(parser.format_help().split())
    assert "initial learning rate (default: 0.001 (paper)" in text
    assert "lowest learning rate (default: 1e-08)" in text


def test_every_field_has_help_and_a_flag() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser)
    text = parser.format_help()
    for item in fields(TrainConfig):
        assert "--" + item.name.replace("_", "-") in text
        assert len(item.metadata["help"]) > 10


def test_only_typed_options_are_given() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, without=("loss",))
    assert given_options(parser.parse_args(["--lr", "0.1"])) == {"lr": 0.1}
    with pytest.raises(SystemExit):
        parser.parse_args(["--loss", "ce"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("margin", -0.1),
        ("margin", 1.1),
        ("metric_weight", -1.0),
        ("metric_weight", float("inf")),
        ("lr", float("nan")),
        ("lr", 0.0),
        ("batch_size", 1),
        ("epochs", 0),
        ("epochs", "3"),
        ("epochs", 3.0),
        ("seed", -1),
        ("test_fraction", 0.0),
        ("validation_fraction", 0.6),
        ("skip_broken", 1),
        ("image_size", 7),
        ("ema", 1.0),
        ("optimiser", "adm"),
        ("schedule", "cosin"),
        ("augment", "copy"),
        ("augment", "flips+"),
        ("augment", "flips+copies"),
        ("augment", "flips+shifts+flips"),
        ("select", "best"),
        ("stop_patience", -1),
        ("clip_grad", -1.0),
        ("similarity", "cosine"),
        ("eq3", "plus"),
        ("warmup_epochs", 400),
        ("warmup_epochs", -2),
        ("weight_decay", -0.1),
        ("label_smoothing", 1.0),
        ("class_weights", "balance"),
        ("validation", "tests"),
    ],
)
def test_a_value_out_of_range_is_named(name: str, value: object) -> None:
    with pytest.raises(UserError) as raised:
        TrainConfig(**{name: value})  # type: ignore[arg-type]
    assert "--" + name.replace("_", "-") in str(raised.value)
    assert str(value) in str(raised.value)


@pytest.mark.parametrize(
    ("name", "value", "nearest"),
    [("loss", "ce+bts", "ce+bst"), ("batches", "mine", "mined"), ("device", "cud", "cuda")],
)
def test_an_unknown_name_gets_the_nearest_suggested(name: str, value: str, nearest: str) -> None:
    with pytest.raises(UserError, match=f"did you mean '{nearest.replace('+', '[+]')}'"):
        TrainConfig(**{name: value})  # type: ignore[arg-type]


def test_an_unknown_field_of_a_file_is_an_error() -> None:
    with pytest.raises(UserError, match="did you mean 'margin'"):
        TrainConfig.from_dict({"margins": 0.9}, Path("some.json"))


@given(st.sampled_from(list(BUILT_IN)), st.sampled_from(BATCHES))
@settings(derandomize=True)
def test_schemes_read_as_they_are_written(loss: str, batches: str) -> None:
    scheme = Scheme(loss, batches)
    assert Scheme.parse(str(scheme)) == scheme


def test_slugs_are_distinct_and_plain() -> None:
    slugs = {Scheme(loss, batches).slug for loss in BUILT_IN for batches in BATCHES}
    assert len(slugs) == len(BUILT_IN) * len(BATCHES)
    assert all(slug.replace("-", "").isalnum() for slug in slugs)


def test_a_scheme_may_set_any_other_field() -> None:
    text = "ce+bst:mined:margin=0.5:skip-broken=true:backbone=peleenet:lr=1"
    scheme = Scheme.parse(text)
    assert scheme == {
        "loss": "ce+bst", "batches": "mined", "margin": 0.5, "skip_broken": True,
        "backbone": "peleenet", "lr": 1.0,
    }  # fmt: skip
    assert Scheme.parse(str(scheme)) == scheme
    assert scheme.slug == "ce-bst-mined-margin-0.5-skip-broken-true-backbone-peleenet-lr-1.0"


def test_a_scheme_is_a_mapping_that_cannot_be_changed() -> None:
    scheme = Scheme("ce+bst", "mined", margin=0.5, lr=0.1)
    other = Scheme.parse("ce+bst:mined:lr=0.1:margin=0.5")
    assert (scheme, hash(scheme)) == (other, hash(other))
    assert scheme != scheme.without("lr")
    assert scheme.without("lr", "margin") == Scheme("ce+bst", "mined")
    assert TrainConfig(**scheme).margin == scheme["margin"] == 0.5
    assert list(scheme) == ["loss", "batches", "margin", "lr"]
    with pytest.raises(TypeError):
        scheme["margin"] = 0.9  # type: ignore[index]
    with pytest.raises(AttributeError):
        scheme.margin = 0.9  # type: ignore[attr-defined]
    assert Scheme("ce", "random", lr=1) == Scheme("ce", "random", lr=1.0)


@pytest.mark.parametrize("name", ["ce+triplet", "ce+ls"])
def test_a_loss_is_entered_in_the_registry_alone(name: str) -> None:
    sources = Path(loss_registry.__file__).parent.rglob("*.py")
    assert [path.name for path in sources if f'"{name}"' in path.read_text("utf-8")] == [
        "loss_registry.py"
    ]


def test_a_file_that_lacks_a_field_is_an_error() -> None:
    values = TrainConfig().to_dict()
    del values["margin"]
    with pytest.raises(UserError, match=r"some.json has no field margin"):
        TrainConfig.from_dict(values, Path("some.json"))


@pytest.mark.parametrize(
    "text",
    [
        "ce", "ce:mind", "bst:mined", "", "ce:mined:margin", "ce:mined:margin=2",
        "ce:mined:lr=fast", "ce:mined:skip_broken=1", "ce:mined:seed=1", "ce:mined:lr=1:lr=2",
        "ce:mined:loss=ce",
    ],
)  # fmt: skip
def test_a_bad_scheme_is_named(text: str) -> None:
    with pytest.raises(UserError, match=f"scheme '{text}'"):
        Scheme.parse(text)


def test_an_unknown_field_of_a_scheme_gets_the_nearest_suggested() -> None:
    with pytest.raises(UserError, match="did you mean 'margin'"):
        Scheme.parse("ce:mined:margins=0.5")


def test_difference_names_fields_and_both_values() -> None:
    difference = describe_difference(TrainConfig(epochs=3, lr=0.1), TrainConfig(epochs=5, lr=0.1))
    assert difference == "epochs (3 here, 5 there)"


def test_importing_the_package_and_its_configuration_is_light() -> None:
    code = "import sys, bstriplet, bstriplet.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
