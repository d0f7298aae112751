"""The summary and its paired test, the reading of run folders, and report.html."""

from __future__ import annotations

import csv
import json
import shlex
import shutil
import warnings
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from bstriplet import cli
from bstriplet.config import STRONG, Scheme, TrainConfig, given_options, with_recipe
from bstriplet.errors import UserError
from bstriplet.report import figures
from bstriplet.report import page as report
from bstriplet.report.reproduce import Target, draw
from bstriplet.study import read_runs, statistics
from bstriplet.training.metrics import METRICS
from digit_runs import write_comparison, write_run
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import rc_context
from scipy import stats

CASES = settings(derandomize=True, deadline=None, max_examples=100)
CE, CE_MINED = Scheme("ce", "random"), Scheme("ce", "mined")
BST, BST_MINED = Scheme("ce+bst", "random"), Scheme("ce+bst", "mined")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "compare"
    return write_comparison(folder, ["ce:random", "ce+bst:mined"], [0, 1, 2])


@pytest.fixture
def compare_folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "compare")


@pytest.fixture
def no_pictures(monkeypatch):
    """Skip the drawing, which takes seconds each, in tests that read only a report's text."""
    monkeypatch.setattr(report, "pictures", lambda comparison: [])


def comparison_of(accuracies: dict[Scheme, dict[int, float]]) -> read_runs.Comparison:
    """A comparison whose runs hold nothing but an accuracy."""
    seeds = sorted({seed for runs in accuracies.values() for seed in runs})
    runs = [
        read_runs.Run(None, scheme, seed, {}, {}, (), dict.fromkeys(METRICS, value))
        for scheme, found in accuracies.items()
        for seed, value in sorted(found.items())
    ]
    return read_runs.Comparison(None, tuple(accuracies), tuple(seeds), tuple(runs))


def paired(accuracies):
    return [row.paired for row in statistics.summarise_schemes(comparison_of(accuracies))]


# -- the statistics


@CASES
@given(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 200)), min_size=2, max_size=12))
def test_the_paired_test_equals_its_textbook_form(counts):
    ours = {seed: a / 200 for seed, (a, _) in enumerate(counts)}
    theirs = {seed: b / 200 for seed, (_, b) in enumerate(counts)}
    none, test = paired({CE: theirs, BST: ours})
    assert none is None
    differences = np.array([a - b for a, b in counts]) / 200
    n, mean = len(counts), differences.mean()
    assert test.n == n
    assert test.difference == pytest.approx(mean)
    if len({a - b for a, b in counts}) == 1:
        assert (test.p, test.low, test.verdict) == (None, None, "not told apart")
        return
    error = differences.std(ddof=1) / np.sqrt(n)
    p = 2 * stats.t.sf(abs(mean) / error, n - 1)
    half = stats.t.ppf(0.975, n - 1) * error
    assert test.p == pytest.approx(p, rel=1e-6, abs=1e-12)
    assert test.p_holm == pytest.approx(test.p)
    assert (test.low, test.high) == pytest.approx((mean - half, mean + half))
    if p < 0.049:
        assert test.verdict == ("better" if mean > 0 else "worse")
    if p > 0.051:
        assert test.verdict == "not told apart"


@CASES
@given(st.permutations(range(6)), st.integers(0, 1000))
def test_pairs_are_made_by_seed_whatever_their_order(order, start):
    rng = np.random.default_rng(start)
    theirs, ours = rng.uniform(size=6), rng.uniform(size=6)
    straight = paired({CE: dict(enumerate(theirs)), BST: dict(enumerate(ours))})
    shuffled = paired(
        {CE: {s: theirs[s] for s in order}, BST: {s: ours[s] for s in reversed(order)}}
    )
    assert straight == shuffled


def test_holm_is_the_step_down_of_bonferroni():
    rng = np.random.default_rng(3)
    base = rng.uniform(0.8, 0.9, 6)
    runs = {
        scheme: dict(enumerate(base + shift + rng.normal(0, 0.01, 6)))
        for scheme, shift in ((CE, 0), (CE_MINED, 0.004), (BST, 0.02), (BST_MINED, 0.012))
    }
    tests = [test for test in paired(runs) if test]
    low, middle, high = sorted(test.p for test in tests)
    adjusted = sorted(test.p_holm for test in tests)
    assert adjusted[0] == pytest.approx(min(1, 3 * low))
    assert adjusted[1] == pytest.approx(min(1, max(3 * low, 2 * middle)))
    assert adjusted[2] == pytest.approx(min(1, max(3 * low, 2 * middle, high)))


def test_seeds_that_only_one_scheme_has_make_no_pair():
    _, test = paired({CE: {0: 0.8, 1: 0.82, 5: 0.1}, BST: {0: 0.9, 1: 0.91, 7: 0.2}})
    assert test.n == 2
    assert test.difference == pytest.approx(0.095)


@pytest.mark.parametrize(
    ("ours", "words"),
    [
        ({7: 0.9}, "no finished seed in common"),
        ({0: 0.9}, "one seed that they share. A test needs two seeds or more"),
        ({0: 0.9, 1: 0.91}, "not told apart from CE (RS): +10.00 points of accuracy on each of 2"),
        ({0: 0.9, 1: 0.92, 2: 0.9}, "CE+BST (RS) is better than CE (RS): +9.67 points"),
        ({0: 0.7, 1: 0.72, 2: 0.7}, "CE+BST (RS) is worse than CE (RS): -10.33 points"),
        ({0: 0.9, 1: 0.7, 2: 0.8}, "not told apart from CE (RS): -1.00 points"),
    ],
)
def test_verdicts_are_plain(ours, words):
    comparison = comparison_of({CE: {0: 0.8, 1: 0.81, 2: 0.82}, BST: ours})
    (sentence,) = statistics.verdicts(comparison, statistics.summarise_schemes(comparison))
    assert words in sentence


def test_the_first_ce_scheme_is_the_baseline_wherever_it_stands():
    accuracies = {BST: {0: 0.9}, CE_MINED: {0: 0.8}, CE: {0: 0.7}}
    comparison = comparison_of(accuracies)
    assert {comparison.baseline_of(scheme) for scheme in accuracies} == {CE_MINED}
    without = comparison_of({BST: {0: 0.9}, BST_MINED: {0: 0.9}})
    assert without.baseline_of(BST) is None
    (sentence,) = statistics.verdicts(without, statistics.summarise_schemes(without))
    assert "no baseline" in sentence


def test_the_baseline_is_the_cross_entropy_of_the_same_network():
    networks = {"backbone": "peleenet"}, {"backbone": "efficientnet_b1"}, {}
    schemes = [
        Scheme(loss, batches, **settings, **more)
        for settings in networks
        for loss, batches, more in (
            ("ce", "random", {}),
            ("ce+bst", "mined", {"groups_per_class": 3, "margin": 0.5}),
        )
    ]
    comparison = comparison_of({scheme: {0: 0.9} for scheme in schemes})
    assert [comparison.baseline_of(scheme) for scheme in schemes[1::2]] == schemes[::2]
    assert [comparison.baseline_of(scheme) for scheme in schemes[::2]] == schemes[::2]
    tests = [row.paired for row in statistics.summarise_schemes(comparison)]
    assert [test is None for test in tests] == [True, False] * 3


def test_a_network_without_cross_entropy_of_its_own_is_compared_with_no_other():
    schemes = [
        Scheme("ce", "random", backbone="efficientnet_b1", lr=0.01),
        Scheme("ce", "random"),
        Scheme("ce+bst", "mined", backbone="peleenet"),
        Scheme("ce+bst", "mined", backbone="efficientnet_b1"),
        Scheme("ce+ls", "random", backbone="shufflenet_v2"),
    ]
    comparison = comparison_of({scheme: {0: 0.9, 1: 0.8} for scheme in schemes})
    comparison = replace(comparison, shared={"backbone": "shufflenet_v2"})
    summaries = statistics.summarise_schemes(comparison)
    wanted = [None, None, None, schemes[0], schemes[1]]
    assert [row.baseline for row in summaries] == wanted
    assert [row.paired is None for row in summaries] == [scheme is None for scheme in wanted]
    nothing, first, second = statistics.verdicts(comparison, summaries)
    assert nothing.startswith("CE+BST (DM), PeleeNet is compared with nothing")
    assert "not told apart from CE (RS), EfficientNet-B1, lr 0.01" in first
    assert "not told apart from CE (RS): " in second
    found = list(csv.DictReader(statistics.schemes_csv(summaries).splitlines()))
    named = ["", "", "", "CE (RS), EfficientNet-B1, lr 0.01", "CE (RS)"]
    assert [row["baseline"] for row in found] == named


@pytest.mark.usefixtures("no_pictures")
def test_each_of_two_networks_is_judged_by_its_own_cross_entropy_everywhere(tmp_path):
    """The report, the tables and a table of the paper have the same two pairs."""
    networks = ["peleenet", "shufflenet_v2"]
    texts = [f"{s}:backbone={n}" for s in ("ce:random", "ce+bst:mined") for n in networks]
    folder = write_comparison(tmp_path / "compare", texts, [0, 1, 2])
    for seed, accuracy in enumerate((0.2, 0.1, 0.3)):  # the other network's would be no match
        path = folder / "runs" / "ce-random-backbone-shufflenet_v2" / f"seed-{seed}"
        metrics = json.loads((path / "metrics.json").read_text())
        (path / "metrics.json").write_text(json.dumps(metrics | {"accuracy": accuracy}))
    comparison = read_runs.read_comparison(folder)
    ours = {
        name: np.mean(
            [
                one.metrics["accuracy"] - other.metrics["accuracy"]
                for one, other in zip(
                    comparison.finished_of(Scheme("ce+bst", "mined", backbone=name)),
                    comparison.finished_of(Scheme("ce", "random", backbone=name)),
                    strict=True,
                )
            ]
        )
        for name in networks
    }
    assert abs(ours["peleenet"] - ours["shufflenet_v2"]) > 0.2
    text = " ".join(report.write_summary(folder).split())
    page = report.write_report(folder).read_text()
    for name, label in zip(networks, ("PeleeNet", "ShuffleNet-V2"), strict=True):
        said = statistics.points(ours[name])
        assert f"CE (RS), {label}: {said} points" in text
        assert said in page
    with (folder / "summary_by_scheme.csv").open() as file:
        rows = list(csv.DictReader(file))[2:]
    assert [float(row["difference"]) for row in rows] == pytest.approx(list(ours.values()))
    target = Target("", "chest1", comparison.schemes, ("backbone",), table=4)
    drawn = draw("table4", target, None, comparison.runs, tmp_path)
    tests = [row.summary.paired for row in drawn.rows][2:]
    assert [test.difference for test in tests] == pytest.approx(list(ours.values()))


@pytest.mark.parametrize("n", [2, 5, 10])
def test_the_detectable_difference_is_found_as_often_as_it_says(n):
    sd = 0.013
    shift = statistics.detectable_difference(sd, n)
    samples = np.random.default_rng(n).normal(shift, sd, (5_000, n))
    found = stats.ttest_1samp(samples, 0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.025)
    assert statistics.detectable_difference(2 * sd, n) == pytest.approx(2 * shift)


# -- summarise


def test_the_table_and_its_files_hold_mean_and_sd_of_the_runs(compare_folder):
    text = report.write_summary(compare_folder)
    metrics = [
        json.loads(path.read_text())
        for path in sorted(compare_folder.glob("runs/ce-random/*/metrics.json"))
    ]
    accuracies = [found["accuracy"] for found in metrics]
    mean, sd = np.mean(accuracies), np.std(accuracies, ddof=1)
    (line,) = [line for line in text.splitlines() if line.startswith("CE (RS)  ")]
    assert f"{100 * mean:.2f} ± {100 * sd:.2f}" in line
    assert f"{np.mean([found['auc'] for found in metrics]):.4f}" in line

    with (compare_folder / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["accuracy"]) for row in rows[:3]] == accuracies
    assert [(row["scheme"], row["seed"]) for row in rows] == [
        (scheme, str(seed)) for scheme in ("CE (RS)", "CE+BST (DM)") for seed in range(3)
    ]
    with (compare_folder / "per_class.csv").open() as file:
        classes = list(csv.DictReader(file))
    assert len(classes) == 6 * 3
    assert float(classes[1]["f1"]) == metrics[0]["per_class"][1]["f1"]
    with (compare_folder / "summary_by_scheme.csv").open() as file:
        first, second = csv.DictReader(file)
    assert float(first["accuracy_mean"]) == pytest.approx(mean)
    assert float(first["accuracy_sd"]) == pytest.approx(sd)
    assert first["p"] == ""
    assert second["paired_seeds"] == "3"
    assert second["verdict"] in text


@pytest.mark.usefixtures("no_pictures")
def test_missing_and_unfinished_runs_are_said(compare_folder):
    shutil.rmtree(compare_folder / "runs" / "ce-random" / "seed-1")
    (compare_folder / "runs" / "ce-bst-mined" / "seed-2" / "metrics.json").unlink()
    text = report.write_summary(compare_folder)
    assert "CE (RS), seed 1: not started" in text
    assert "CE+BST (DM), seed 2: not finished, 10 epochs so far" in text
    page = report.write_report(compare_folder).read_text()
    assert "CE (RS), seed 1: not started" in page
    assert "4 of 6 runs finished" in page


def test_a_comparison_that_has_just_begun_has_a_summary_and_a_report(tmp_path):
    asked = {"schemes": ["ce:random", "ce+bst:mined"], "seeds": [0]}
    (tmp_path / "compare.json").write_text(json.dumps(asked))
    text = report.write_summary(tmp_path)
    assert "No run has finished yet." in text
    assert "CE (RS), seed 0: not started" in text
    assert "No run has finished yet." in report.write_report(tmp_path).read_text()


def test_runs_are_known_by_their_configuration_not_by_their_folder(compare_folder):
    before = report.write_summary(compare_folder)
    (compare_folder / "runs" / "ce-random").rename(compare_folder / "runs" / "another name")
    assert report.write_summary(compare_folder) == before


def test_a_log_cut_in_the_middle_of_a_line_is_read_up_to_there(compare_folder):
    run = compare_folder / "runs" / "ce-random" / "seed-0"
    whole = len(read_runs.read_comparison(run).runs[0].log)
    text = (run / "log.jsonl").read_text()
    (run / "log.jsonl").write_text(text[:-20])
    assert len(read_runs.read_comparison(run).runs[0].log) == whole - 1


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", "{}", "config.json"),
        ("config.json", "[1", "config.json"),
        ("metrics.json", "{", "metrics.json"),
        ("metrics.json", '{"accuracy": 1}', "metrics.json.*per_class"),
        ("metrics.json", '{"per_class": 3}', "metrics.json.*per_class"),
        ("metrics.json", '{"per_class": [{"class": "0"}]}', "metrics.json.*support"),
        ("environment.json", '{"data": null}', "environment.json.*data"),
        ("environment.json", '{"data": {"images": []}}', "environment.json.*images"),
        ("environment.json", '{"data": {"images": {"train": 3}}}', "environment.json.*images"),
        ("log.jsonl", "{\n{}\n", "log.jsonl.*line 1"),
        ("predictions.csv", "", "predictions.csv"),
        ("predictions.csv", "file,label,prob_0,prob_1,prob_2\na,9,1,0,0\n", "predictions.csv"),
        ("embeddings.npz", "no zip", "embeddings.npz"),
        ("mistakes.npz", "no zip", "mistakes.npz"),
    ],
)
def test_a_damaged_file_is_named(compare_folder, name, content, words):
    (compare_folder / "runs" / "ce-random" / "seed-0" / name).write_text(content)
    with pytest.raises(UserError, match=words):
        report.write_report(compare_folder)


@pytest.mark.parametrize("content", ["[]", "{}", '{"schemes": 3, "seeds": [0]}'])
def test_a_damaged_list_of_runs_is_no_reason_to_delete_the_runs(compare_folder, content):
    (compare_folder / "compare.json").write_text(content)
    with pytest.raises(UserError, match=r"compare\.json cannot be used .*; restore it$"):
        report.write_report(compare_folder)


@pytest.mark.parametrize("name", ["predictions.csv", "embeddings.npz", "mistakes.npz"])
def test_a_file_that_was_cut_is_named(compare_folder, name):
    path = compare_folder / "runs" / "ce-random" / "seed-0" / name
    content = path.read_bytes()
    # predictions.csv then ends with a complete row: only the number of rows shows the cut
    path.write_bytes(content[: content.rindex(b"\n", 0, len(content) // 2) + 1])
    with pytest.raises(UserError, match=f"{name} cannot be used"):
        report.write_report(compare_folder)


def test_a_folder_of_neither_kind_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"neither a run folder .* nor a compare folder"):
        report.write_report(tmp_path)


def test_two_folders_of_one_scheme_and_seed_are_refused(compare_folder):
    runs = compare_folder / "runs" / "ce-random"
    shutil.copytree(runs / "seed-0", runs / "copy of seed-0")
    with pytest.raises(UserError, match="hold the same scheme and seed"):
        report.write_summary(compare_folder)


# -- report.html


class Page(HTMLParser):
    """The tags left open, the text, and every address of a page."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.tags, self.addresses, self.alternatives = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        found = dict(attributes)
        self.addresses += [found[name] for name in ("src", "href") if name in found]
        if tag == "img":
            self.alternatives.append(found["alt"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_report_stands_alone_and_holds_every_part(compare_folder):
    path = report.write_report(compare_folder)
    assert path == compare_folder / "report.html"
    page = Page(path.read_text())
    assert page.open == []
    assert "script" not in page.tags
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.addresses)
    # accuracy 1; ROC 2; calibration 2; the others one panel per scheme
    assert len(page.alternatives) == 1 + 2 + 2 + 4 * 2
    assert all(page.alternatives)
    text = " ".join(" ".join(page.texts).split())
    for words in (
        "CE (RS) against CE+BST (DM)",
        "6 of 6 runs finished",
        "Class by class",
        "How far to trust this",
        "backbone mlp",
        "seed 0, 1, 2",
        "python 3.11",
        "packages torch: 2.14, timm: 1.0",
        "bstriplet compare --schemes ce:random ce+bst:mined --seeds 0 1 2 --recipe paper",
        "--recipe paper --backbone mlp",
        "Images 0 1 2 Total train 8 8 8 24 validation",
        "data.notes none",
    ):
        assert words in text
    names = {file.name for file in (compare_folder / "figures").iterdir()}
    for picture in figures.pictures(read_runs.read_comparison(compare_folder)):
        assert {f"{picture.name}.png", f"{picture.name}.svg", f"{picture.name}.csv"} <= names


def test_a_single_run_has_a_report(finished, tmp_path):
    run = shutil.copytree(finished / "runs" / "ce-bst-mined" / "seed-1", tmp_path / "run")
    page = Page(report.write_report(run).read_text())
    text = " ".join(" ".join(page.texts).split())
    assert "CE+BST (DM), seed 1" in text
    assert f"{100 * json.loads((run / 'metrics.json').read_text())['accuracy']:.2f}" in text
    assert len(page.alternatives) == 4 + 2 + 2
    assert (
        "bstriplet train --recipe paper --backbone mlp --loss ce+bst --batches mined --seed 1"
        in text
    )
    assert "against CE (RS)" not in text


def test_the_command_of_a_report_has_options_that_are_switched_on_and_off(tmp_path):
    write_run(tmp_path / "run", Scheme("ce", "random", channels_last=False, amp=True), 0)
    command = report._command(read_runs.read_comparison(tmp_path / "run"))
    assert command.endswith("--amp --no-channels-last")
    options = cli._parser().parse_args([*shlex.split(command)[1:], "--out", "again"])
    assert given_options(options) == {"backbone": "mlp", "amp": True, "channels_last": False}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "--recipe paper --backbone mlp"),
        (with_recipe(STRONG, {}), "--recipe strong --backbone mlp"),
        (with_recipe(STRONG, {"epochs": 80}), "--recipe strong --backbone mlp --epochs 80"),
        (
            with_recipe(STRONG, {"warmup_epochs": 3}),
            "--recipe strong --backbone mlp --warmup-epochs 3",
        ),
        ({"augment": "copies"}, "--recipe paper --backbone mlp --augment copies"),
    ],
)
def test_the_command_of_a_report_makes_the_same_configuration(tmp_path, settings, words):
    write_run(tmp_path / "run", Scheme("ce", "random", **settings), 0)
    comparison = read_runs.read_comparison(tmp_path / "run")
    command = report._command(comparison)
    assert command == f"bstriplet train {words}"
    options = cli._parser().parse_args([*shlex.split(command)[1:], "--out", "again"])
    made = TrainConfig(**with_recipe(options.recipe, given_options(options)))
    assert made.to_dict() == comparison.runs[0].config


def test_a_report_is_replaced_whole_and_leaves_no_other_file(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "pictures", lambda shown: [figures.confusion_matrices(shown)])
    run = write_run(tmp_path / "run", CE, 0)
    first = report.write_report(run).read_bytes()
    files = sorted(run.rglob("*"))
    assert report.write_report(run).read_bytes() == first
    assert sorted(run.rglob("*")) == files


def test_text_from_outside_is_escaped(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "pictures", lambda shown: [figures.confusion_matrices(shown)])
    names = ("<script>alert(1)</script>", 'a"b', "a&b")
    run = write_run(tmp_path / "run", CE, 0, names)
    config = json.loads((run / "config.json").read_text())
    config["data"] = "<b>bold</b>"
    (run / "config.json").write_text(json.dumps(config))
    page = Page(report.write_report(run).read_text())
    assert "script" not in page.tags
    text = "".join(page.texts)
    assert names[0] in text
    assert "<b>bold</b>" in text


def test_names_that_no_page_can_hold_are_shown_as_escapes(tmp_path, monkeypatch):
    """Bytes that are not UTF-8 and a control character, with a user's own settings of figures."""
    chosen = figures.confusion_matrices, figures.embeddings, figures.misclassified
    monkeypatch.setattr(report, "pictures", lambda shown: [draw(shown) for draw in chosen])
    names = ("肺炎", "norm\udce9", "bell\a")
    run = write_run(tmp_path / "run", CE, 0, names)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"data": "/images\udcff"}))
    with rc_context({"text.usetex": True}), warnings.catch_warnings():
        warnings.simplefilter("error")
        page = Page(report.write_report(run).read_text(encoding="utf-8"))
    text = " ".join(page.texts)
    for words in ("肺炎", r"norm\xe9", r"bell\x07", r"/images\xff"):
        assert words in text
    for name in ("confusion_matrix", "embeddings", "misclassified"):
        svg = (run / "figures" / f"{name}.svg").read_text(encoding="utf-8")
        assert r"norm\xe9" in "".join(ElementTree.fromstring(svg).itertext())
        assert b",norm\xe9," in (run / "figures" / f"{name}.csv").read_bytes()


def test_classes_of_runs_on_other_data_are_told_apart_by_name(tmp_path):
    folder = write_comparison(tmp_path / "compare", ["ce:random"], [0], ("a", "b", "c"))
    other = Scheme.parse("ce:random:data=elsewhere")
    run = write_run(folder / "runs/other/seed-0", other, 0, ("z", "b", "a"))
    asked = json.loads((folder / "compare.json").read_text())
    (folder / "compare.json").write_text(
        json.dumps(asked | {"schemes": ["ce:random", str(other)], "config": {"data": "digits"}})
    )
    groups = {
        found["name"]: found for found in report._per_class(read_runs.read_comparison(folder))
    }
    assert list(groups) == ["a", "b", "c", "z"]
    assert [len(found["rows"]) for found in groups.values()] == [2, 2, 1, 1]
    last = json.loads((run / "metrics.json").read_text())["per_class"][2]
    first, _ = read_runs.read_comparison(folder).finished
    counts = sorted((first.metrics["per_class"][0]["support"], last["support"]))
    assert counts[0] < counts[1]
    assert groups["a"]["support"] == f"{counts[0]}-{counts[1]}"
    assert groups["c"]["support"] == str(first.metrics["per_class"][2]["support"])
    assert groups["a"]["rows"][1]["cells"][0] == f"{100 * last['precision']:.2f}"
    assert report._images(read_runs.read_comparison(folder))["classes"] == ["a", "b", "c", "z"]


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("content", ["{}", '{"data": {}}', '{"data": {"images": {}}}', None])
def test_a_run_that_does_not_say_where_it_ran_is_reported(compare_folder, content):
    for path in compare_folder.glob("runs/*/*/environment.json"):
        path.unlink() if content is None else path.write_text(content)
    assert report.write_report(compare_folder).exists()


@pytest.mark.usefixtures("no_pictures")
def test_runs_that_kept_no_mistakes_are_reported_without_them(compare_folder):
    for path in compare_folder.glob("runs/*/*/mistakes.npz"):
        path.unlink()
    assert "no sheet of mistakes" in report.write_report(compare_folder).read_text()


@pytest.mark.usefixtures("no_pictures")
def test_validation_on_test_images_is_held_against_the_numbers(tmp_path):
    run = write_run(tmp_path / "run", CE, 0)
    assert "too good" not in report.write_report(run).read_text()
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"validation": "test"}))
    assert "too good" in report.write_report(run).read_text()


def test_a_place_that_cannot_be_written_is_named(compare_folder):
    (compare_folder / "figures").write_text("a file where a folder should be")
    with pytest.raises(UserError, match="figures"):
        report.write_report(compare_folder)
