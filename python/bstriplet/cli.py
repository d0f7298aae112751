"""The ``bstriplet`` command: its options, and a function for each of its subcommands."""

import argparse
import codecs
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from importlib.metadata import version
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO

from bstriplet.config import (
    PAPER,
    STRONG,
    Scheme,
    TrainConfig,
    add_options,
    describe_difference,
    fields_of,
    given_options,
    with_recipe,
)
from bstriplet.data.notes import on_screen
from bstriplet.errors import UserError, one_line
from bstriplet.paper import REPRODUCIBLE
from bstriplet.text import visible

DEFAULT_SCHEMES = ("ce:random", "ce+bst:mined")
DEFAULT_SEEDS = (0, 1, 2)
SWEPT_LOSS = "ce+bst"
DEFAULT_WEIGHTS = (0.0, 0.1, 0.3, 1.0, 3.0)
REPRODUCE_SEEDS = 5

# The commands check the options before they import torch, timm and scikit-learn: help and most
# mistakes are answered at once.


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are :class:`UserError`, printed as one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status.

    0 for success; 1 if nobody reads the output any more; 2 for bad input; 128 plus the number of
    the signal for Ctrl-C (130) and SIGTERM (143).
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with _stopped_by_sigterm(), _standard_error():
            options = _parser().parse_args(given)
            options.typed = given
            options.run_command(options)
    except UserError as error:
        _say(f"bstriplet: {one_line(error)}")
        return 2
    except KeyboardInterrupt as interrupt:
        _say(f"bstriplet: interrupted; {_how_to_continue(given)}")
        return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)
    except BrokenPipeError:  # the reader of our output, such as head, has left
        return 1
    finally:
        if arguments is None:  # a caller in the same process keeps its output
            _drop_output()
    return 0


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """Stop the command at SIGTERM; only a main thread can set a handler, others change nothing."""
    before = signal.getsignal(signal.SIGTERM)  # None: not set by Python, which cannot restore it
    ours = before is not None and threading.current_thread() is threading.main_thread()
    if ours:
        try:
            signal.signal(signal.SIGTERM, _stop)
        except ValueError:  # the main thread of a subinterpreter
            ours = False
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _standard_error() -> Iterator[None]:
    """Open a standard error for progress bars if there is none, as without a Windows console."""
    if sys.stderr is not None:
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stderr(nowhere):
        yield


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """Stop the command like Ctrl-C; clusters send SIGTERM some time before they kill."""
    raise KeyboardInterrupt(number)


def _say(text: str) -> None:
    """Print a line on standard error, at once."""
    _write(sys.stderr, visible(text) + "\n")


def _print(*lines: str) -> None:
    """Print lines on standard output, at once."""
    _put("".join(line + "\n" for line in lines))


def _put(text: str) -> bool:
    """Write text on standard output, at once, as :func:`_write` does.

    Raises:
        BrokenPipeError: nobody reads standard output any more.
        UserError: standard output cannot be written, such as a file on a full disk.
    """
    try:
        return _write(sys.stdout, text)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(
            f"cannot write standard output: {error.strerror or one_line(error)}; give it "
            "room (files of results are complete)"
        ) from error


def _drop_output() -> None:
    """Drop text that standard output cannot take: Python would try to write it again at exit."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _write(stream: TextIO | None, text: str) -> bool:
    """Write text at once, whatever the stream's encoding.

    Bytes of file names are written unchanged; other characters that the encoding lacks are written
    as escapes. Both are escaped for a stream that takes no bytes, or whose encoding does not extend
    ASCII, such as UTF-16. Without a stream, as in a Windows program without a console, nothing is
    written.

    Returns:
        True if no character was escaped.
    """
    if stream is None:
        return True
    encoding = getattr(stream, "encoding", None)
    try:
        if encoding:  # a strict check: the stream itself may escape, as standard error does
            text.encode(encoding)
        stream.write(text)
        stream.flush()
        return True
    except UnicodeEncodeError:
        encoding = encoding or "utf-8"
    if not isinstance(stream, TextIOWrapper) or "\n".encode(encoding) != b"\n":
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
        return False
    try:
        content, whole = text.encode(encoding, "surrogateescape"), True
    except UnicodeEncodeError:
        content, whole = text.encode(encoding, "bstriplet.escape"), False
    stream.flush()
    stream.buffer.write(content)
    stream.flush()
    return whole


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    """Encode a byte of a file name as itself, and any other character as an escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    error.end = error.start + 1  # one character at a time: each may be of either kind
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)


codecs.register_error("bstriplet.escape", _escape)


def _how_to_continue(given: list[str]) -> str:
    """Return how to continue an interrupted command."""
    command = given[0] if given else ""
    if command in ("train", "compare", "sweep"):
        resume = [] if "--resume" in given else ["--resume"]
        return f"continue with: bstriplet {shlex.join([*given, *resume])}"
    if command in ("demo", "reproduce"):
        return f"continue with: bstriplet {shlex.join(given)}"
    return "nothing was written"


def _parser() -> _Parser:
    parser = _Parser(
        prog="bstriplet",
        description="Train light CNNs with cross entropy and the batch-similarity triplet loss.",
    )
    parser.add_argument("--version", action="version", version=version("bstriplet-kernels"))
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    train = commands.add_parser("train", help="train one model")
    _add_output(train)
    _add_recipe(train, STRONG)
    add_options(train)
    train.set_defaults(run_command=_train)

    compare = commands.add_parser("compare", help="train each scheme with each seed; table, report")
    _add_output(compare)
    compare.add_argument(
        "--schemes",
        nargs="+",
        metavar="LOSS:BATCHES[:FIELD=VALUE...]",
        help="schemes to compare, for example ce+bst:mined or ce:random:lr=0.01 "
        f"(default: {' '.join(DEFAULT_SCHEMES)})",
    )
    _add_seeds(compare)
    _add_recipe(compare, STRONG)
    add_options(compare, without=("loss", "batches", "seed"))
    compare.set_defaults(run_command=_compare)

    sweep = commands.add_parser(
        "sweep", help="compare weights (lambda) and margins (m) of a loss; table, figure, report"
    )
    _add_output(sweep)
    sweep.add_argument(
        "--metric-weights",
        nargs="+",
        type=float,
        metavar="WEIGHT",
        help="values of lambda; 0 is plain cross entropy (default: "
        f"{' '.join(f'{weight:g}' for weight in DEFAULT_WEIGHTS)})",
    )
    sweep.add_argument(
        "--margins",
        nargs="+",
        type=float,
        metavar="MARGIN",
        help="values of m, each with each weight (default: the margin of train)",
    )
    _add_seeds(sweep)
    _add_recipe(sweep, STRONG)
    sweep.add_argument(
        "--loss", default=argparse.SUPPRESS, help=f"weighted loss (default: {SWEPT_LOSS})"
    )
    add_options(sweep, without=("loss", "metric_weight", "margin", "seed"))
    sweep.set_defaults(run_command=_sweep)

    reproduce = commands.add_parser(
        "reproduce", help="the paper's tables and figures from runs of your own"
    )
    reproduce.add_argument(
        "targets", nargs="+", metavar="TARGET", help=f"{', '.join(REPRODUCIBLE)}, or all"
    )
    reproduce.add_argument(
        "--out", type=Path, required=True, help="folder of runs, tables and figures"
    )
    reproduce.add_argument(
        "--seeds",
        type=int,
        metavar="K",
        help=f"seeds 0 to K-1 of each scheme (default: {REPRODUCE_SEEDS})",
    )
    reproduce.add_argument(
        "--from",
        dest="folders",
        nargs="+",
        type=Path,
        metavar="FOLDER",
        help="train nothing: draw from the finished runs of these compare folders",
    )
    _add_recipe(reproduce, PAPER)
    add_options(reproduce, without=("loss", "batches", "seed"))
    reproduce.set_defaults(run_command=_reproduce)

    report = commands.add_parser("report", help="table and report of existing runs")
    report.add_argument("folder", type=Path, help="a run folder or a compare folder")
    report.set_defaults(run_command=_report)

    evaluate = commands.add_parser("evaluate", help="print the test metrics of a trained model")
    _add_run(evaluate, "; without --data, the rest must be the images that the run began with")
    evaluate.add_argument(
        "--data",
        help="other images: a folder test/CLASS/* or CLASS/*, a .csv or .tsv, a MedMNIST .npz, or "
        "medmnist:NAME; only their test part, if they have one (default: the run's test part)",
    )
    evaluate.set_defaults(run_command=_evaluate)

    predict = commands.add_parser("predict", help="classify images: a CSV of probabilities")
    _add_run(predict, "")
    predict.add_argument("images", nargs="+", type=Path, help="image files or folders")
    predict.add_argument("--output", type=Path, help="CSV file (default: standard output)")
    predict.set_defaults(run_command=_predict)

    data = commands.add_parser(
        "data", help="print the layout of data, their split, and notes on them"
    )
    data.add_argument("data", metavar="DATA", help="as for --data of train")
    add_options(data, only=(*fields_of("data"), "seed"), without=("data",))
    data.set_defaults(run_command=_data)

    demo = commands.add_parser(
        "demo", help="compare CE with CE + BST on a few images a class, in minutes"
    )
    demo.add_argument("--data", default="digits", help="'digits' or a folder (default: digits)")
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("runs/demo"),
        help="results go into a folder in this one, named after the data (default: runs/demo)",
    )
    demo.set_defaults(run_command=_demo)
    return parser


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument(
        "--resume", action="store_true", help="continue the command that was interrupted in --out"
    )


def _add_seeds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        metavar="SEED",
        help=f"seeds of each scheme (default: {' '.join(map(str, DEFAULT_SEEDS))})",
    )


def _add_recipe(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        help=f"defaults of the options below: {PAPER}, those of section 3.1, or {STRONG}, under "
        f"which cross entropy alone trains well (default: {default})",
    )


def _config(given: dict[str, Any], recipe: str | None) -> TrainConfig:
    """Return the configuration of something new: the strong recipe, unless another is typed."""
    return TrainConfig(**with_recipe(recipe or STRONG, given))


def _continued(stored: TrainConfig, given: dict[str, Any], recipe: str | None) -> TrainConfig:
    """Return the stored configuration with what is typed; the caller refuses a difference.

    A typed recipe stands for all its fields: those that the first command line gave otherwise must
    be typed again, too.
    """
    if recipe is None:
        return replace(stored, **given)
    return replace(stored, **with_recipe(recipe, {"data": stored.data, **given}))


def _add_run(parser: argparse.ArgumentParser, which: str) -> None:
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished run")
    parser.add_argument(
        "--skip-broken",
        action="store_true",
        help=f"leave out images that cannot be read{which}",
    )
    parser.add_argument(
        "--max-pixels",
        type=int,
        metavar="INT",
        help="largest number of pixels of an image file; 0: any (default: as in the run)",
    )


def _train(options: argparse.Namespace) -> None:
    given = given_options(options)
    config = None if options.resume else _config(given, options.recipe)

    from bstriplet.data.dataset import load_for, split_dataset
    from bstriplet.report import page
    from bstriplet.training.loop import check_models, train
    from bstriplet.training.run_folder import RunFolder, check_free, check_new

    run = RunFolder(options.out)
    if options.resume and run.started:
        check_free(options.out)
        config = _continued(run.config(), given, options.recipe)
        run.check_config(config)
    else:
        check_new(options.out, resume=options.resume)
        config = config or _config(given, options.recipe)
    check_models(config)
    task = split_dataset(load_for(config), config)
    for note in task.notes:
        _say(f"note: {on_screen(note)}")
    metrics = train(config, task, run)
    path = page.write_report(run.path)
    _print(
        f"model of epoch {metrics['tested_epoch']} of {metrics['epochs']} (--select "
        f"{config.select}) on the test set:",
        *_metrics(metrics),
        f"run: {run.path}",
        f"report: {path}",
    )


def _compare(options: argparse.Namespace) -> None:
    schemes = tuple(Scheme.parse(text) for text in options.schemes or ())
    default = tuple(Scheme.parse(text) for text in DEFAULT_SCHEMES)
    experiment = _experiment(options, given_options(options), schemes, default)
    _print(*_run_experiment(experiment, options.out))


def _sweep(options: argparse.Namespace) -> None:
    from bstriplet.study.sweep import sweep_schemes, write_tables

    given = given_options(options)
    typed = options.metric_weights or options.margins or {"loss", "batches"} & given.keys()
    default = sweep_schemes(
        given.pop("loss", SWEPT_LOSS),
        given.pop("batches", TrainConfig.batches),
        options.metric_weights or DEFAULT_WEIGHTS,
        options.margins or (),
    )
    experiment = _experiment(options, given, default if typed else (), default)
    said = _run_experiment(experiment, options.out)
    _print(*said, write_tables(options.out).rstrip("\n"))


def _experiment(
    options: argparse.Namespace,
    given: dict[str, Any],
    schemes: tuple[Scheme, ...],
    default: tuple[Scheme, ...],
) -> Any:
    """Return a new experiment; with ``--resume``, the one in ``--out`` if the options agree.

    ``schemes`` are the typed schemes; a new experiment without them has the ``default`` ones.
    """
    config = None if options.resume else _config(given, options.recipe)
    seeds = tuple(options.seeds or ())

    from bstriplet.study.compare import Experiment, read_experiment, started
    from bstriplet.training.run_folder import check_free, check_new

    if options.resume and started(options.out):
        check_free(options.out)
        experiment = read_experiment(options.out)
        now = _continued(experiment.config, given, options.recipe)
        difference = describe_difference(now, experiment.config)
        if (schemes or experiment.schemes) != experiment.schemes:
            difference = f"schemes ({' '.join(map(str, experiment.schemes))} there)"
        if (seeds or experiment.seeds) != experiment.seeds:
            difference = f"seeds ({' '.join(map(str, experiment.seeds))} there)"
        if difference:
            raise UserError(
                f"{options.out} was started with another configuration: {difference}; leave those "
                "options as they were, or choose another --out"
            )
        return experiment
    check_new(options.out, resume=options.resume)
    config = config or _config(given, options.recipe)
    return Experiment(config, schemes or default, seeds or DEFAULT_SEEDS)


def _demo(options: argparse.Namespace) -> None:
    from bstriplet.study.compare import read_experiment, started
    from bstriplet.study.demo import demo_experiment, linear_model
    from bstriplet.training.run_folder import check_free, check_new

    experiment = demo_experiment(options.data)
    config = experiment.config
    folder = options.out / Path(config.data).name
    check_free(folder)
    if not started(folder):
        check_new(folder, resume=True)
    elif read_experiment(folder) != experiment:
        raise UserError(
            f"{folder} was started with other settings or other data; remove it, or choose another "
            "--out"
        )
    _say(
        f"{config.train_per_class} images a class for training and validation, "
        f"{len(experiment.seeds)} seeds, {config.epochs} epochs, {config.image_size} x "
        f"{config.image_size} pixels, {config.backbone}"
    )
    table, report = _run_experiment(experiment, folder)
    _print(table, linear_model(experiment, folder), report)


def _run_experiment(experiment: Any, folder: Path) -> list[str]:
    """Run an experiment, write its results, and return its table and the path of its report."""
    from bstriplet.report import page
    from bstriplet.study.compare import compare

    started_at = time.perf_counter()
    compare(experiment, folder, _say)
    _say(f"training and evaluation: {time.perf_counter() - started_at:.0f} s")
    return [page.write_summary(folder), f"report: {page.write_report(folder)}"]


def _reproduce(options: argparse.Namespace) -> None:
    given = given_options(options)

    from bstriplet.report import page
    from bstriplet.report.reproduce import draw_targets, targets_named, train_targets

    targets = targets_named(options.targets, given)
    if options.folders:
        if given or options.seeds or options.recipe:
            raise UserError("--from takes runs as they are; leave --seeds and training options out")
        drawn = draw_targets(targets, None, options.folders, options.out)
    else:
        config = _config(given, options.recipe or PAPER)
        n_seeds = REPRODUCE_SEEDS if options.seeds is None else options.seeds
        if n_seeds < 1:
            raise UserError(f"--seeds: {n_seeds} is not allowed; give 1 or more")
        train_targets(targets, config, n_seeds, options.out, _say)
        drawn = draw_targets(targets, config, [options.out], options.out)
    command = shlex.join(["bstriplet", *options.typed])
    path = page.write_reproduction(drawn, command, options.out)
    _print(*(reproduction.markdown() for reproduction in drawn), f"report: {path}")


def _report(options: argparse.Namespace) -> None:
    from bstriplet.report import page
    from bstriplet.study.compare import started

    said = [page.write_summary(options.folder)] if started(options.folder) else []
    _print(*said, f"report: {page.write_report(options.folder)}")


def _evaluate(options: argparse.Namespace) -> None:
    from bstriplet.training.evaluation import evaluate_run
    from bstriplet.training.run_folder import RunFolder

    metrics, notes = evaluate_run(
        RunFolder(options.run),
        options.data,
        skip_broken=options.skip_broken,
        max_pixels=options.max_pixels,
    )
    for note in notes:
        _say(f"note: {note}")
    _print(*_metrics(metrics))


def _predict(options: argparse.Namespace) -> None:
    from bstriplet.storage import check_output, write_output
    from bstriplet.training.evaluation import predict_files
    from bstriplet.training.run_folder import RunFolder

    if options.output:
        check_output(options.output)
    table, notes = predict_files(
        RunFolder(options.run),
        options.images,
        skip_broken=options.skip_broken,
        max_pixels=options.max_pixels,
    )
    for note in notes:
        _say(f"note: {note}")
    if options.output:
        write_output(options.output, table)
        _say(f"predictions: {options.output}")
    elif not _put(table):
        _say(
            f"note: some names are escaped, because standard output is {sys.stdout.encoding}; "
            "--output writes UTF-8"
        )


def _data(options: argparse.Namespace) -> None:
    config = TrainConfig(**given_options(options))

    from bstriplet.data.dataset import load_for, split_dataset
    from bstriplet.data.description import describe

    dataset = load_for(config)
    _print(describe(dataset, split_dataset(dataset, config)))


def _metrics(metrics: dict[str, Any]) -> list[str]:
    """Return one line for each metric of the paper's tables, in per cent except for AUC."""
    from bstriplet.training.metrics import METRICS

    lines = []
    for name in METRICS:
        value = metrics[name]
        if value is None:
            shown = "undefined"
        else:
            shown = f"{value:.4f}" if name == "auc" else f"{100 * value:.2f} %"
        lines.append(f"  {name:<12} {shown}")
    return lines
