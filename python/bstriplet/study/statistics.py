"""Mean and spread of each scheme over its seeds, and the paired test against cross entropy."""

from __future__ import annotations

import csv
import io
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from scipy.optimize import brentq
from scipy.special import ncfdtr
from scipy.stats import t, ttest_rel

from bstriplet.config import Scheme
from bstriplet.study.read_runs import Comparison, Run, scheme_label
from bstriplet.training.metrics import METRICS

LEVEL = 0.05
POWER = 0.8
TERMINAL_WIDTH = 88
# Differences below this are rounding: accuracies are quotients of integers.
ROUNDING = 1e-12

Pair = TypeVar("Pair", int, tuple[str, int])
"""The key that the two runs of a pair share: a seed, or a network and a seed."""


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of `n` values; `sd` is None for fewer than two."""

    n: int
    mean: float | None
    sd: float | None


@dataclass(frozen=True)
class PairedTest:
    """Accuracy of a scheme minus the baseline's, seed by seed, as fractions of 1.

    `low` and `high` bound the 95 % confidence interval of the mean difference. `p` is the p-value
    of the two-sided paired t test; `p_holm` has Holm's adjustment for all schemes that are compared
    with a baseline. `detectable` is the true difference that the test finds with a power of 80 %.
    All five are None if no test is possible: with fewer than two shared seeds, or if all
    differences are the same.
    """

    n: int
    difference: float | None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    detectable: float | None = None
    p_holm: float | None = None

    @property
    def verdict(self) -> str:
        """`better`, `worse` or `not told apart`, at 5 % of the adjusted p."""
        if self.p_holm is None or self.difference is None or self.p_holm >= LEVEL:
            return "not told apart"
        return "better" if self.difference > 0 else "worse"


@dataclass(frozen=True)
class SchemeSummary:
    """One scheme: its finished runs' metrics, and the test against its baseline, if it has one."""

    scheme: Scheme
    n_runs: int
    metrics: dict[str, Spread]
    paired: PairedTest | None
    baseline: Scheme | None = None

    @property
    def label(self) -> str:
        """The scheme as Table 3 writes it."""
        return scheme_label(self.scheme)


def summarise_schemes(comparison: Comparison) -> list[SchemeSummary]:
    """Summaries of the finished runs, one per scheme, in the order of the comparison."""
    pairs = {
        scheme: baseline
        for scheme in comparison.schemes
        if (baseline := comparison.baseline_of(scheme)) and baseline != scheme
    }
    found = [
        paired_test(_accuracies(comparison, scheme), _accuracies(comparison, baseline))
        for scheme, baseline in pairs.items()
    ]
    tests = dict(zip(pairs, holm(found), strict=True))
    return [
        SchemeSummary(
            scheme=scheme,
            n_runs=len(runs),
            metrics={name: spread(_metric(runs, name)) for name in METRICS},
            paired=tests.get(scheme),
            baseline=pairs.get(scheme),
        )
        for scheme in comparison.schemes
        for runs in [comparison.finished_of(scheme)]
    ]


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation of values; `values` may be empty."""
    if not values:
        return Spread(0, None, None)
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Spread(len(values), float(np.mean(values)), sd)


def verdict_sentence(summary: SchemeSummary) -> str:
    """The result of the paired test of a scheme, which is not a baseline itself, in a sentence."""
    test, one = summary.paired, summary.label
    if summary.baseline is None:
        return (
            f"{one} is compared with nothing: no scheme is plain cross entropy (ce) of its network."
        )
    other = scheme_label(summary.baseline)
    if test is None or test.difference is None:
        return f"{one} and {other} have no finished seed in common: nothing to compare."
    by = f"{points(test.difference)} points of accuracy"
    if test.n == 1:
        return (
            f"{one} is not told apart from {other}: {by} on the one seed that they share. "
            "A test needs two seeds or more, and five or more to see much."
        )
    if test.p is None or test.p_holm is None or test.low is None or test.high is None:
        return (
            f"{one} is not told apart from {other}: {by} on each of {test.n} paired seeds; "
            "a test needs differences that vary."
        )
    adjusted = f", adjusted p {p_value(test.p_holm)}" if test.p_holm > test.p else ""
    evidence = (
        f"{by}, 95 % confidence interval {points(test.low)} to {points(test.high)}, "
        f"p {p_value(test.p)}{adjusted}, {test.n} paired seeds"
    )
    if test.verdict == "not told apart":
        return f"{one} is not told apart from {other}: {evidence}. {power_sentence(test)}"
    return f"{one} is {test.verdict} than {other}: {evidence}."


def power_sentence(test: PairedTest) -> str:
    """The power of a test, in a sentence."""
    if test.detectable is None:
        return "The power of the test is not known: it needs differences that vary."
    return (
        f"With {test.n} seeds and this spread, a true difference of "
        f"{100 * test.detectable:.1f} points is found in {100 * POWER:.0f} % of experiments."
    )


def text_table(comparison: Comparison) -> str:
    """The table of a comparison, its verdicts and its missing runs, as plain text."""
    summaries = summarise_schemes(comparison)
    header = ("Scheme", "Seeds", "ACC (%)", "SEN (%)", "SPE (%)", "AUC")
    rows = [
        (
            summary.label,
            str(summary.n_runs),
            *(percent(summary.metrics[name]) for name in METRICS[:3]),
            area(summary.metrics["auc"]),
        )
        for summary in summaries
    ]
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in [header, tuple("-" * w for w in widths), *rows]
    ]
    gaps = comparison.gaps()
    paragraphs = [
        "\n".join(lines),
        *(
            textwrap.fill(sentence, TERMINAL_WIDTH)
            for sentence in [metrics_note(comparison), *verdicts(comparison, summaries)]
        ),
        "\n  ".join(["Not in the table:", *gaps]) if gaps else "",
    ]
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def metrics_note(comparison: Comparison) -> str:
    """A sentence on the columns: values of the positive class, or means over the classes."""
    if not comparison.finished:
        return "No run has finished yet."
    positive = comparison.finished[0].metrics["positive"]
    of = f"are those of {positive!r}" if positive else "are means over the classes"
    return f"Mean ± standard deviation over seeds, on the test images. SEN, SPE and AUC {of}."


def verdicts(comparison: Comparison, summaries: Sequence[SchemeSummary]) -> list[str]:
    """A sentence for each scheme that is not itself a baseline."""
    if len(comparison.schemes) == 1:
        return []
    if not any(map(comparison.baseline_of, comparison.schemes)):
        return ["No scheme is plain cross entropy (ce): there is no baseline to compare with."]
    return [
        verdict_sentence(summary)
        for summary in summaries
        if comparison.baseline_of(summary.scheme) != summary.scheme
    ]


def runs_csv(comparison: Comparison) -> str:
    """One row per run, finished or not. Metrics are fractions of 1; empty means undefined."""
    header = ("scheme", "loss", "batches", "seed", "finished", *METRICS, "tested_epoch", "epochs")
    return to_csv(
        header,
        (
            (
                scheme_label(run.scheme),
                run.scheme.loss,
                run.scheme.batches,
                run.seed,
                run.finished,
                *(run.metrics.get(name) for name in (*METRICS, "tested_epoch")),
                len(run.log),
            )
            for run in comparison.runs
        ),
    )


def per_class_csv(comparison: Comparison) -> str:
    """One row per finished run and class. Metrics are fractions of 1; empty means undefined."""
    quantities = ("support", "precision", "sensitivity", "f1", "specificity", "auc")
    return to_csv(
        ("scheme", "seed", "class", *quantities),
        (
            (scheme_label(run.scheme), run.seed, row["class"], *(row[name] for name in quantities))
            for run in comparison.finished
            for row in run.metrics["per_class"]
        ),
    )


def schemes_csv(summaries: Sequence[SchemeSummary]) -> str:
    """One row per scheme: means, standard deviations and the paired test, as fractions of 1."""
    tested = ("difference", "low", "high", "p", "p_holm", "verdict", "detectable")
    header = ["scheme", "loss", "batches", "runs"]
    header += [f"{name}_{part}" for name in METRICS for part in ("mean", "sd")]
    header += ["baseline", "paired_seeds", *tested]
    rows = []
    for summary in summaries:
        row: list[Any] = [summary.label, summary.scheme.loss, summary.scheme.batches]
        row.append(summary.n_runs)
        for name in METRICS:
            row += [summary.metrics[name].mean, summary.metrics[name].sd]
        test = summary.paired
        row.append(scheme_label(summary.baseline) if summary.baseline else None)
        row += [test.n, *(getattr(test, name) for name in tested)] if test else [None] * 8
        rows.append(row)
    return to_csv(header, rows)


def to_csv(header: Iterable[str], rows: Iterable[Sequence[Any]]) -> str:
    """Comma-separated text with a header line; None is an empty cell."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return buffer.getvalue()


def percent(values: Spread) -> str:
    """ "93.10 ± 0.52", from fractions of 1."""
    return _mean_and_sd(values, 100, 2)


def area(values: Spread) -> str:
    """ "0.9812 ± 0.0040"."""
    return _mean_and_sd(values, 1, 4)


def points(difference: float) -> str:
    """A difference of two fractions in signed percentage points: "+1.10"."""
    return f"{100 * difference:+.2f}"


def p_value(p: float) -> str:
    """ "= 0.031" or, where three digits would be a bare 0, "< 0.001"."""
    return f"= {p:.3f}" if p >= 0.001 else "< 0.001"


def _mean_and_sd(values: Spread, scale: float, digits: int) -> str:
    if values.mean is None:
        return "-"
    mean = f"{scale * values.mean:.{digits}f}"
    return mean if values.sd is None else f"{mean} ± {scale * values.sd:.{digits}f}"


def _metric(runs: Sequence[Run], name: str) -> list[float]:
    values = [run.metrics.get(name) for run in runs]
    return [value for value in values if value is not None]


def _accuracies(comparison: Comparison, scheme: Scheme) -> dict[int, float]:
    runs = comparison.finished_of(scheme)
    return dict(zip((run.seed for run in runs), _metric(runs, "accuracy"), strict=True))


def paired_test(ours: Mapping[Pair, float], theirs: Mapping[Pair, float]) -> PairedTest:
    """The two-sided paired t test of two sets of values, over the keys (seeds) in both."""
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return PairedTest(0, None)
    differences = np.array([ours[seed] - theirs[seed] for seed in seeds])
    mean = float(differences.mean())
    if len(seeds) == 1 or np.ptp(differences) < ROUNDING:
        return PairedTest(len(seeds), mean)
    result = ttest_rel([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds])
    interval = result.confidence_interval(1 - LEVEL)
    return PairedTest(
        n=len(seeds),
        difference=mean,
        low=float(interval.low),
        high=float(interval.high),
        p=float(result.pvalue),
        detectable=detectable_difference(float(differences.std(ddof=1)), len(seeds)),
    )


def detectable_difference(sd: float, n: int, power: float = POWER, level: float = LEVEL) -> float:
    """The least true mean difference that a paired t test at this level finds with this power.

    Args:
        sd: standard deviation of the differences, > 0.
        n: pairs, at least 2.
        power: the share of experiments in which the test finds it, between ``level`` and 1.
        level: the test's error of the first kind, both tails together.
    """
    critical = float(t.ppf(1 - level / 2, n - 1))

    def shortfall(shift: float) -> float:
        # t² is a noncentral F: both tails at once, and without the gaps of scipy's noncentral t.
        return float(power - 1 + ncfdtr(1, n - 1, shift**2, critical**2))

    highest = critical
    while shortfall(highest) > 0:
        highest *= 2
    return float(brentq(shortfall, 0, highest)) * sd / math.sqrt(n)


def holm(tests: Sequence[PairedTest]) -> list[PairedTest]:
    """The tests with Holm's adjusted p-values: the step-down form of Bonferroni's bound."""
    judged = sorted((test.p, index) for index, test in enumerate(tests) if test.p is not None)
    adjusted = list(tests)
    running = 0.0
    for rank, (p, index) in enumerate(judged):
        running = max(running, min(1.0, (len(judged) - rank) * p))
        adjusted[index] = replace(tests[index], p_holm=running)
    return adjusted
