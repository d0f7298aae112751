"""The figures: the numbers that they show, and that they can be drawn from any runs."""

from __future__ import annotations

import csv
import json
import warnings
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from bstriplet import config
from bstriplet.report import figures
from bstriplet.study import read_runs
from digit_runs import write_comparison
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import rcParams
from PIL import Image
from sklearn.metrics import roc_auc_score

SCHEMES = ["ce:random", "ce:mined", "ce+bst:random", "ce+bst:mined"]
CASES = settings(derandomize=True, deadline=None, max_examples=60)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures") / "compare"
    return read_runs.read_comparison(write_comparison(folder, SCHEMES, [0, 1]))


def rows(picture):
    return [dict(zip(picture.header, row, strict=True)) for row in picture.rows]


def test_each_picture_is_written_as_png_svg_and_csv(comparison, tmp_path):
    before = dict(rcParams)
    drawn = figures.pictures(comparison)
    names = [picture.name for picture in drawn]
    assert names == [
        "accuracy",
        "loss_curves",
        "embeddings",
        "confusion_matrix",
        "roc",
        "calibration",
        "misclassified",
    ]
    for picture in drawn:
        picture.write(tmp_path)
        with Image.open(tmp_path / f"{picture.name}.png") as image:
            width, height = image.size
            darkest = image.convert("L").getextrema()[0]
        columns = min(2, len(picture.panels))
        assert width == pytest.approx(160 * columns * picture.size[0], abs=1)
        assert height > 100
        assert darkest < 100
        ElementTree.parse(tmp_path / f"{picture.name}.svg")
        with (tmp_path / f"{picture.name}.csv").open() as file:
            header, *lines = csv.reader(file)
        assert tuple(header) == picture.header
        assert lines == [[str(cell) for cell in row] for row in picture.rows]
    assert dict(rcParams) == before


def test_a_panel_is_drawn_the_same_way_twice_and_follows_dark_mode(comparison):
    picture = figures.accuracies(comparison)
    first, second = picture.panel_svgs(), picture.panel_svgs()
    assert first == second
    (svg,) = first
    assert "prefers-color-scheme: dark" in svg
    root = ElementTree.fromstring(svg)
    texts = "".join(root.itertext())
    for scheme in comparison.schemes:
        assert read_runs.scheme_label(scheme) in texts
        colour = figures.looks(comparison.schemes)[scheme].colour
        assert f"var(--c{colour[1:]}, {colour})" in svg


def test_four_schemes_have_four_colours_with_a_dark_counterpart_each(comparison):
    colours = [look.colour for look in figures.looks(comparison.schemes).values()]
    assert len(set(colours)) == 4
    assert len({figures.DARK[colour] for colour in colours}) == 4


def test_no_two_schemes_of_a_network_look_alike_and_networks_share_their_looks():
    losses = ["ce", "ce+bst", "ce+ls", "ce+SupConLoss", "ce+ContrastiveLoss"]
    texts = [f"{loss}:{batches}" for loss in losses for batches in ("random", "mined")]
    texts += [f"ce+bst:{batches}:margin=0.{m}" for batches in ("mined", "random") for m in range(9)]
    schemes = [config.Scheme.parse(text) for text in texts]
    other = [config.Scheme(**s, backbone="peleenet") for s in schemes]
    found = figures.looks([*schemes, *other])
    assert len({(look.colour, str(look.line)) for look in found.values()}) == len(schemes)
    assert [found[scheme] for scheme in schemes] == [found[scheme] for scheme in other]
    assert {look.colour for look in found.values()} <= figures.DARK.keys()


def test_curves_of_several_networks_are_drawn_in_a_panel_each(tmp_path):
    schemes = ["ce:random", "ce+bst:mined", "ce:random:backbone=peleenet"]
    comparison = read_runs.read_comparison(write_comparison(tmp_path / "compare", schemes, [0]))
    titles = [panel.title for panel in figures.roc_curves(comparison).panels]
    assert titles == ["mlp", "PeleeNet"]
    titles = [panel.title for panel in figures.calibration(comparison).panels]
    names = ("mlp", "PeleeNet")
    assert titles == [f"{what}, {name}" for name in names for what in ("Reliability", "How sure")]
    one, two = figures.calibration(comparison).panel_svgs()[::2]
    assert "CE+BST (DM)" in one
    assert "CE+BST (DM)" not in two


def test_loss_curves_show_the_log(comparison):
    shown = rows(figures.loss_curves(comparison))
    assert len(shown) == sum(len(run.log) for run in comparison.runs)
    run = comparison.runs[-1]
    label = read_runs.scheme_label(run.scheme)
    mine = [row for row in shown if row["scheme"] == label and row["seed"] == run.seed]
    for row, epoch in zip(mine, run.log, strict=True):
        assert row["epoch"] == epoch["epoch"]
        assert row["train_loss"] == epoch["train_loss"]
        assert row["validation_loss"] == epoch["validation_loss"]


def test_confusion_matrices_are_sums_over_seeds(comparison):
    shown = rows(figures.confusion_matrices(comparison))
    for scheme in comparison.schemes:
        wanted = sum(
            np.array(run.metrics["confusion_matrix"]) for run in comparison.finished_of(scheme)
        )
        mine = [row for row in shown if row["scheme"] == read_runs.scheme_label(scheme)]
        counts = np.array([row["count"] for row in mine]).reshape(wanted.shape)
        shares = np.array([row["share_of_true"] for row in mine]).reshape(wanted.shape)
        assert (counts == wanted).all()
        assert np.allclose(shares, wanted / wanted.sum(axis=1, keepdims=True))


def test_embeddings_are_those_of_the_first_seed(comparison):
    shown = rows(figures.embeddings(comparison))
    assert {row["seed"] for row in shown} == {0}
    first = comparison.runs[0].embeddings
    mine = [row for row in shown if row["scheme"] == "CE (RS)"]
    assert [row["class"] for row in mine] == [first.classes[label] for label in first.labels]


def test_embeddings_take_one_seed_that_every_scheme_has(comparison):
    missing = [run for run in comparison.runs if (str(run.scheme), run.seed) != ("ce:mined", 0)]
    shown = rows(figures.embeddings(replace(comparison, runs=tuple(missing))))
    assert {row["seed"] for row in shown} == {1}


@CASES
@given(st.integers(0, 10_000), st.integers(3, 20), st.integers(2, 6))
def test_the_principal_plane_knows_nothing_of_length_and_holds_most_variance(seed, n, d):
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(n, d))
    plane, shares = figures.principal_plane(vectors)
    lengths = rng.uniform(1e-8, 1e8, size=(n, 1))
    rescaled, _ = figures.principal_plane(vectors * lengths)
    assert np.allclose(plane, rescaled, atol=1e-6)

    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    eigenvalues = np.linalg.eigvalsh(np.cov(unit.T))[::-1]
    assert np.allclose(plane.var(axis=0, ddof=1), eigenvalues[:2], atol=1e-9)
    assert np.allclose(shares, eigenvalues[:2] / eigenvalues.sum(), atol=1e-9)


def test_embeddings_that_coincide_are_drawn_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plane, shares = figures.principal_plane(np.ones((5, 3)))
        zero, _ = figures.principal_plane(np.zeros((5, 3)))
    assert np.allclose(plane, 0)
    assert np.allclose(zero, 0)
    assert shares == [0, 0]


@st.composite
def predictions(draw):
    n = draw(st.integers(1, 30))
    n_classes = draw(st.integers(2, 4))
    labels = np.array(draw(st.lists(st.integers(0, n_classes - 1), min_size=n, max_size=n)))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    names = tuple(f"class {index}" for index in range(n_classes))
    files = tuple(map(str, range(n)))
    return read_runs.Predictions(labels, rng.dirichlet(np.ones(n_classes), n), names, files)


@CASES
@given(predictions())
def test_a_roc_curve_climbs_from_corner_to_corner_over_its_area(found):
    positive = found.classes[1] if len(found.classes) == 2 else None
    curve = figures.roc(found, positive)
    judged = [1] if positive else range(len(found.classes))
    areas = [
        roc_auc_score(found.labels == index, found.probabilities[:, index])
        for index in judged
        if 0 < np.sum(found.labels == index) < len(found.labels)
    ]
    if not areas:
        assert curve is None
        return
    assert (curve[0], curve[-1]) == (0, 1)
    assert all(low <= high + 1e-12 for low, high in pairwise(curve))
    # A step may lie anywhere between two points of the grid, at most 0.01 apart.
    area = np.sum(np.diff(figures.RATES) * (curve[1:] + curve[:-1]) / 2)
    assert area == pytest.approx(np.mean(areas), abs=0.02)


def test_calibration_pools_the_seeds(comparison):
    shown = rows(figures.calibration(comparison))
    for scheme in comparison.schemes:
        runs = comparison.finished_of(scheme)
        mine = [row for row in shown if row["scheme"] == read_runs.scheme_label(scheme)]
        images = sum(row["images"] for row in mine)
        assert images == sum(run.metrics["n_images"] for run in runs)
        right = sum(row["images"] * row["accuracy"] for row in mine)
        assert right / images == pytest.approx(np.mean([run.metrics["accuracy"] for run in runs]))


def test_mistakes_are_all_wrong_predictions_the_surest_over_seeds_first(comparison):
    scheme = comparison.schemes[0]
    runs = comparison.finished_of(scheme)
    found = [row for row in rows(figures.misclassified(comparison)) if row["scheme"] == "CE (RS)"]
    weights = [row["confidence"] * row["wrong_runs"] / row["runs"] for row in found]
    assert weights == sorted(weights, reverse=True)
    for row in found:
        wrong = []
        for run in runs:
            predictions = run.predictions
            for index, file in enumerate(predictions.files):
                name = predictions.classes[predictions.predicted[index]]
                if file == row["file"] and name != row["true"]:
                    wrong.append(predictions.probabilities[index].max())
        assert len(wrong) == row["wrong_runs"]
        assert np.mean(wrong) == pytest.approx(row["confidence"])
    wrong = sum(int((run.predictions.predicted != run.predictions.labels).sum()) for run in runs)
    assert sum(row["wrong_runs"] for row in found) == wrong


def test_one_run_cut_off_in_its_first_epoch_still_has_its_loss_drawn(comparison, tmp_path):
    run = replace(comparison.runs[0], metrics={}, log=comparison.runs[0].log[:1])
    alone = replace(comparison, schemes=(run.scheme,), seeds=(run.seed,), runs=(run,))
    (picture,) = figures.pictures(alone)
    assert picture.name == "loss_curves"
    picture.write(tmp_path)


def test_awkward_class_names_and_losses_are_drawn(tmp_path):
    names = ("$5 bill$", "_hidden & <b>", "a name that goes on and on and on")
    folder = write_comparison(tmp_path / "compare", ["ce:random"], [0, 1], names)
    log = folder / "runs" / "ce-random" / "seed-0" / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    lines[1]["validation_loss"] = float("nan")
    lines[2]["train_loss"] = 0.0
    lines[3]["validation_loss"] = None
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for picture in figures.pictures(read_runs.read_comparison(folder)):
            picture.write(tmp_path)
            texts = [
                "".join(ElementTree.fromstring(svg).itertext()) for svg in picture.panel_svgs()
            ]
            if picture.name in ("embeddings", "confusion_matrix"):
                assert all("$5 bill$" in text and "_hidden & <b>" in text for text in texts)
