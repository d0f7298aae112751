"""Layouts of data on disk: sets of the paper as they are downloaded, class trees, CSV files."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from bstriplet import paper
from bstriplet.data.image_files import (
    NOWHERE,
    counted_folder,
    entries_of,
    list_images,
    why_left_out,
    why_no_image,
)
from bstriplet.data.names import (
    Spellings,
    check_apart,
    letters,
    one_form,
    same_person,
    says_nothing,
    unknown_class,
)
from bstriplet.data.notes import counted, first
from bstriplet.data.tables import Finder, read_table
from bstriplet.errors import UserError, unknown_name
from bstriplet.text import utf8

TRAIN, VALIDATION, TEST = PARTS = ("train", "validation", "test")

# Spellings of the parts, as folders and in the column "split", in lower case.
_SPELLINGS = {
    "train": TRAIN,
    "training": TRAIN,
    "val": VALIDATION,
    "valid": VALIDATION,
    "validation": VALIDATION,
    "test": TEST,
    "testing": TEST,
}

# Names of the columns of a CSV file, the preferred one first.
_COLUMNS = {
    "path": ("path", "file", "filename", "image"),
    "label": ("label", "class"),
    "patient": ("patient", "patient_id"),
    "split": ("split",),
    "fold": ("fold",),
}

_OSTEOSARCOMA_TABLE = "ML_Features_1144.csv"
_OSTEOSARCOMA_CLASSES = {
    "non-tumor": "Non-Tumor",
    "non-viable-tumor": "Necrotic Tumor",
    "viable": "Viable Tumor",
    "viable-non-viable": "Viable Tumor",
}

# File names of Chest-2: Kaggle's (person12_bacteria_34.jpeg, IM-0115-0001.jpeg,
# NORMAL2-IM-0012-0001.jpeg) and those of later Mendeley versions (BACTERIA-1008087-0001.jpeg).
# Bacterial and viral pneumonia may be numbered separately; the names do not tell. One number is one
# patient here, so that no patient can be on two sides of a split.
_CHEST2_PATIENT = re.compile(
    r"(person\d+)_|((?:NORMAL2-)?IM-\d+)-|(?:NORMAL|BACTERIA|VIRUS)-(\d+)-", re.IGNORECASE
)
_OSTEOSARCOMA_PATIENT = re.compile(r"(case-\d+|p\d+)-")

# Reasons to leave files out, beside those of `image_files`.
BESIDE = "images beside the class folders were left out"
NOT_OPENED = "files or folders beside the images that cannot be opened were left out"
NO_PART = "folders of images beside those of the parts were left out"

LeftOut = dict[str, list[str]]

# The 16 images of Kaggle's folder val are in no table of the paper.
_CHEST2_VALIDATION = 16


class Entry(NamedTuple):
    """One image of a set; ``patient`` and ``fold`` are empty where they are unknown."""

    path: Path
    label: str
    part: str = TRAIN
    patient: str = ""
    fold: str = ""


@dataclass(frozen=True)
class PaperSet:
    """A data set of the paper as it is downloaded.

    name: the argument of :func:`bstriplet.paper.data_set`.
    layout: title and source of the data.
    column: name of a class folder -> its column in the paper's table.
    """

    name: str
    layout: str
    column: Callable[[str], str]

    @property
    def printed(self) -> paper.DataSet:
        """The set as the paper describes it."""
        return paper.data_set(self.name)

    @property
    def table(self) -> str:
        """The name of the paper's table of image counts."""
        return f"Table {self.printed.counts_table}"


def _chest_column(label: str) -> str:
    return "Covid-19" if "covid" in label.lower() else label.capitalize()


def _rash_column(label: str) -> str:
    negative = re.search("neg|non|not|no[^a-z]", label, re.IGNORECASE)
    lyme = "lyme" in label.lower() and not negative
    return "Lyme Disease" if lyme else "Non-Lyme Disease"


CHEST1 = PaperSet(
    "chest1", "Chest-1 (Kaggle prashant268/chest-xray-covid19-pneumonia)", _chest_column
)
CHEST2 = PaperSet(
    "chest2", "Chest-2 (Kaggle paultimothymooney/chest-xray-pneumonia)", _chest_column
)
# Public notebooks read RashData/Train/Train_2_Cases and RashData/Validation/Validation_2_Cases; a
# public classifier of these images calls one class Lyme_Positive. No other names are known. The two
# class folders may therefore have any names, as long as one of them or both contain "Lyme".
RASH = PaperSet("rash", "rash (Kaggle sshikamaru/lyme-disease-rashes)", _rash_column)
OSTEOSARCOMA = PaperSet(
    "osteosarcoma", "osteosarcoma (TCIA Osteosarcoma-Tumor-Assessment)", lambda label: label
)
PAPER_SETS = {known.name: known for known in (CHEST1, CHEST2, RASH, OSTEOSARCOMA)}


@dataclass(frozen=True)
class Count:
    """Images of a class in a part (or ``"all"``): the number found and the paper's number."""

    table: str
    part: str
    label: str
    found: int
    paper: int


@dataclass(frozen=True)
class Listing:
    """The images of a set before any of them is read.

    root: the folder that file names are relative to.
    known: the set of the paper; None for other data.
    counts: numbers of images, found and in the paper; empty for other data.
    notes: remarks for the reader of a report.
    left_out: paths of files and folders that are not used, by reason.
    """

    root: Path
    classes: tuple[str, ...]
    entries: tuple[Entry, ...]
    known: PaperSet | None = None
    counts: tuple[Count, ...] = ()
    notes: tuple[str, ...] = ()
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def name(self, path: Path) -> str:
        """Return ``path`` relative to the root, with forward slashes; in full if it is outside."""
        return utf8(_relative(path, self.root))

    @property
    def left_out_notes(self) -> tuple[str, ...]:
        """Notes that count and name the left-out files."""
        return counted(
            {reason: [self.name(Path(p)) for p in paths] for reason, paths in self.left_out.items()}
        )


def _relative(path: Path, root: Path) -> str:
    """Return ``path`` relative to ``root``, with forward slashes; in full if it is outside.

    Works on strings: for 100,000 files, pathlib would take longer than all other steps.
    """
    return str(path).removeprefix(f"{root}{os.sep}").replace(os.sep, "/")


def recognise(data: str) -> Listing:
    """Return the images of a folder or a CSV file, for training.

    A folder is a set of the paper as Kaggle, Mendeley or TCIA deliver it (the rash images as
    notebooks on Kaggle read them), or a tree train/CLASS/*. The tree may also have test/CLASS/* and
    val/CLASS/*. Case does not matter; Training, Testing, Valid and Validation are read too. A file
    manifest.csv with columns file and patient gives the patients. A CSV file may have any common
    delimiter and encoding (:func:`bstriplet.data.tables.read_table`).
    """
    if is_csv(data):
        return _checked(_read_csv(Path(data)))
    folder = _existing_folder(data)
    return _checked(_osteosarcoma(folder) or _tree(folder))


def recognise_test(data: str) -> Listing:
    """Return the images to test a finished model on: the test part, else all images.

    ``data`` is what :func:`recognise` takes, or a folder CLASS/*.
    """
    if is_csv(data):
        listing = _read_csv(Path(data))
    else:
        folder = _existing_folder(data)
        listing = _osteosarcoma(folder) or _tests(folder)
    tested = tuple(entry for entry in listing.entries if entry.part == TEST)
    return replace(listing, entries=tested or listing.entries)


def is_csv(data: str) -> bool:
    """Whether ``data`` is the path of a table, by its suffix: ``.csv`` or ``.tsv``."""
    return Path(data).suffix.lower() in (".csv", ".tsv")


def _existing_folder(data: str) -> Path:
    """Return ``data`` as a path after checking that it is a folder and not empty."""
    root = Path(data)
    if not os.path.exists(root):
        raise UserError(f"data folder {root} does not exist; give an existing one with --data")
    if not os.path.isdir(root):
        raise UserError(f"{root} is neither a folder nor a .csv or .npz file; give one of these")
    if not entries_of(root):
        raise UserError(f"data folder {root} is empty; lay images out as train/CLASS/*")
    return root


def _checked(listing: Listing) -> Listing:
    """Return the listing if a model can be trained on it; raise otherwise."""
    trained = {entry.label for entry in listing.entries if entry.part == TRAIN}
    if len(trained) < 2:
        only = f"one class only, {next(iter(trained))!r}" if trained else "no images for training"
        raise UserError(f"{listing.root} holds {only}; add images of other classes to train on")
    for entry in listing.entries:
        if entry.label not in trained:
            raise unknown_class(entry.path, entry.label, trained)
    return listing


# --- trees of class folders -----------------------------------------------------------------------


def _folders(folder: Path) -> list[Path]:
    """Return the folders in ``folder``, without hidden and system folders."""
    return [path for path in entries_of(folder) if path.is_dir() and not why_left_out(path.name)]


def _parts(folder: Path) -> dict[str, Path]:
    """Return the folder of each part in ``folder``, in any of the spellings."""
    found: dict[str, Path] = {}
    for path in _folders(folder):
        part = _SPELLINGS.get(path.name.lower())
        if part in found:
            raise UserError(f"{folder} has two folders for {part}: {found[part].name}, {path.name}")
        if part:
            found[part] = path
    return {part: found[part] for part in PARTS if part in found}


def _unwrap(folder: Path, is_root: Callable[[Path], bool]) -> Path | None:
    """Return the first folder that ``is_root`` accepts; None if there is none.

    Archives wrap data in folders that hold one folder each: up to three of them are opened.
    """
    inner = folder
    for _ in range(4):
        if is_root(inner):
            return inner
        below = _folders(inner)
        if len(below) != 1:
            return None
        inner = below[0]
    return None


def _tree(folder: Path) -> Listing:
    """Return the images of a tree train/CLASS/*."""
    root = _unwrap(folder, lambda inner: TRAIN in _parts(inner))
    if root is None:
        raise UserError(
            f"data folder {folder} has no folder 'train'; lay images out as train/CLASS/*"
        )
    parts = _parts(root)
    # The rash set keeps its classes one level lower: Train/Train_2_Cases/CLASS/*.
    cases = {part: _two_cases(path) for part, path in parts.items()}
    left_out: LeftOut = defaultdict(list)
    _note_the_rest(folder, root, [*parts.values()], left_out)
    for part, path in cases.items():
        _note_the_rest(parts[part], path, [], left_out)
    entries = [
        entry for part, path in cases.items() for entry in _class_folders(path, part, left_out)
    ]
    classes = tuple(sorted({entry.label for entry in entries if entry.part == TRAIN}))
    patients, notes = _manifest_patients(root, entries)
    known = _known_set(classes, entries)
    if known is CHEST2:
        patients = _chest2_patients(entries, root) | patients
        entries, of_validation = _without_kaggles_validation(entries)
        notes += of_validation
    if known is RASH and TEST not in parts:  # the paper tests on the images in Validation
        entries = [e._replace(part=TEST) if e.part == VALIDATION else e for e in entries]
    listed = tuple(
        entry._replace(patient=patients.get(_relative(entry.path, root), "")) for entry in entries
    )
    counts = _count_parts(listed, known) if known else ()
    return Listing(root, classes, listed, known, counts, (*notes, *_differences(counts)), left_out)


def _known_set(classes: Sequence[str], entries: Sequence[Entry]) -> PaperSet | None:
    """Return the set of the paper that has these classes, or None."""
    keys = set(map(letters, classes))
    if keys == {"normal", "pneumonia", "covid19"}:
        return CHEST1
    if keys == {"normal", "pneumonia"}:
        n_named = sum(_CHEST2_PATIENT.match(entry.path.name) is not None for entry in entries)
        return CHEST2 if n_named > 0.9 * len(entries) else None
    if len(keys) == 2 and any("lyme" in key for key in keys):
        return RASH
    return None


def _tests(folder: Path) -> Listing:
    """Return the images of test/CLASS/*, else those of a tree train/CLASS/*, else of CLASS/*."""
    root = _unwrap(folder, lambda inner: bool(_parts(inner)))
    parts = _parts(root) if root else {}
    if TEST not in parts and TRAIN in parts:
        return _tree(folder)
    tested = _two_cases(parts[TEST]) if TEST in parts else folder
    left_out: LeftOut = defaultdict(list)
    _note_the_rest(parts.get(TEST, folder), tested, [], left_out)
    entries = tuple(_class_folders(tested, TEST, left_out))
    classes = tuple(sorted({entry.label for entry in entries}))
    return Listing(root or folder, classes, entries, left_out=left_out)


def _two_cases(folder: Path) -> Path:
    below = [path for path in _folders(folder) if path.name.lower().endswith("_2_cases")]
    return below[0] if len(below) == 1 else folder


def _note_the_rest(folder: Path, inner: Path, used: Sequence[Path], left_out: LeftOut) -> None:
    """Add unused images to ``left_out``: in ``inner`` and on the way from ``folder`` down to it.

    ``used`` are the folders in ``inner`` that are used; if empty, all its folders are.
    """
    used = used or _folders(inner)
    way = [above for above in (inner, *inner.parents) if above.is_relative_to(folder)]
    for here in way:
        for path in entries_of(here):
            if path in used or path in way:
                continue
            try:
                reason, name = _what_is_beside(path)
            except UserError:  # not a part of the data, so that it need not be readable
                reason, name = NOT_OPENED, str(path)
            if reason:
                left_out[reason].append(name)


def _what_is_beside(path: Path) -> tuple[str, str]:
    """Return why a file or folder beside the data is left out, and its name; "" without images."""
    if not path.is_dir():
        reason = why_no_image(str(path)) or BESIDE
        return (reason if reason in (BESIDE, NOWHERE) else ""), str(path)
    if reason := why_left_out(path.name):
        name = counted_folder(str(path))
        return ("" if name == str(path) else reason), name
    count = len(list_images(path).images)
    return (NO_PART if count else ""), f"{path} ({count} images)"


def _class_folders(folder: Path, part: str, left_out: LeftOut) -> Iterator[Entry]:
    """Yield the images of each class folder in ``folder``; an empty class folder is an error."""
    names = _folders(folder)
    if not names:
        raise UserError(f"{folder} has no class folders; lay images out as {folder.name}/CLASS/*")
    labels = {path: one_form(utf8(path.name)) for path in names}
    check_apart({label: path for path, label in labels.items()})
    for path, label in labels.items():
        if says_nothing(label):
            raise UserError(
                f"class folder {path}: {label!r} says that there is no class; rename or remove it"
            )
        found = list_images(path)
        if not found.images:
            others = "".join(f"; {len(of)} {reason}" for reason, of in found.left_out.items())
            raise UserError(f"class folder {path} has no images; fill it or remove it{others}")
        for reason, left in found.left_out.items():
            left_out[reason] += left
        for file in found.images:
            yield Entry(file, label, part)


def _chest2_patients(entries: Sequence[Entry], root: Path) -> dict[str, str]:
    """Return the patient of each image that is named as in Chest-2."""
    return {
        _relative(entry.path, root): next(filter(None, match.groups()))
        for entry in entries
        if (match := _CHEST2_PATIENT.match(entry.path.name))
    }


def _without_kaggles_validation(entries: list[Entry]) -> tuple[list[Entry], list[str]]:
    """Return the images without the 16 of Kaggle's folder val, as in Table 5, and a note."""
    n_validation = sum(entry.part == VALIDATION for entry in entries)
    if not 0 < n_validation <= _CHEST2_VALIDATION:
        return entries, []
    rest = [entry for entry in entries if entry.part != VALIDATION]
    return rest, [
        f"the {n_validation} images of the folder val are left out: too few to validate on, and "
        f"{CHEST2.table} does not count them"
    ]


# --- osteosarcoma, as the Cancer Imaging Archive delivers it --------------------------------------


def _osteosarcoma(folder: Path) -> Listing | None:
    """Return the tiles that the osteosarcoma table lists; None if ``folder`` is another set."""

    def holds_tiles(inner: Path) -> bool:
        return os.path.isfile(inner / _OSTEOSARCOMA_TABLE) or any(
            path.name.lower().startswith("training-set-") for path in _folders(inner)
        )

    root = _unwrap(folder, holds_tiles)
    if root is None:
        return None
    table = root / _OSTEOSARCOMA_TABLE
    if not table.is_file():
        raise UserError(
            f"{root} has no {_OSTEOSARCOMA_TABLE}, which says the class of each tile; put it there "
            "(from the data set's page in the Cancer Imaging Archive)"
        )
    found = list_images(root)
    tiles: dict[str, Path] = {}
    twice = [
        str(path) for path in found.images if tiles.setdefault(_dashed(path.stem), path) is not path
    ]
    entries = []
    columns = {"name": ("image.name",), "label": ("classification",)}
    listed = read_table(table, columns)
    for line, row in listed.rows:
        key = _dashed(row["label"])
        if key not in _OSTEOSARCOMA_CLASSES:
            raise unknown_name(f"{line}, classification", row["label"], _OSTEOSARCOMA_CLASSES)
        name = _dashed(row["name"])
        patient = _OSTEOSARCOMA_PATIENT.match(name)
        entries.append(
            Entry(
                tiles.pop(name, root / f"{name}.jpg"),  # named in the error if it is missing
                _OSTEOSARCOMA_CLASSES[key],
                patient=patient.group(1) if patient else "",
            )
        )
    left_out = {
        reason: [name for name in names if not is_csv(name)]  # the tables of the set
        for reason, names in found.left_out.items()
    }
    left_out[f"images that are not in {table.name} were left out"] = [*map(str, tiles.values())]
    left_out["images named as another tile were left out"] = twice
    classes = OSTEOSARCOMA.printed.classes
    counts = tuple(
        Count(
            OSTEOSARCOMA.table,
            "all",
            label,
            sum(entry.label == label for entry in entries),
            sum(printed[label] for printed in OSTEOSARCOMA.printed.counts.values()),
        )
        for label in classes
    )
    return Listing(
        root,
        classes,
        tuple(entries),
        OSTEOSARCOMA,
        counts,
        (*listed.notes, *_differences(counts)),
        left_out,
    )


def _dashed(name: str) -> str:
    """Return a name in lower case, without .jpg, its words joined by dashes."""
    return re.sub("[^a-z0-9]+", "-", name.lower().removesuffix(".jpg")).strip("-")


# --- counts ---------------------------------------------------------------------------------------


def _count_parts(entries: Iterable[Entry], known: PaperSet) -> tuple[Count, ...]:
    """Return the number of images of each class and part, found and in the paper."""
    found = Counter((entry.part, known.column(entry.label)) for entry in entries)
    return tuple(
        Count(known.table, part, label, found[part, label], printed[label])
        for label in known.printed.classes
        for part, printed in known.printed.counts.items()
    )


def _differences(counts: Sequence[Count]) -> tuple[str, ...]:
    """Return a note on counts that differ from the paper's."""
    differing = [count for count in counts if count.found != count.paper]
    if not differing:
        return ()
    listed = ", ".join(f"{c.part} {c.label} {c.found} ({c.paper})" for c in differing)
    return (f"not the counts of {differing[0].table} (in brackets): {listed}",)


# --- CSV files ------------------------------------------------------------------------------------


def _read_csv(file: Path) -> Listing:
    """Return the images that a CSV file lists; paths are relative to the file."""
    if not os.path.isfile(file):
        raise UserError(f"data file {file} does not exist; give an existing one with --data")
    table = read_table(file, _COLUMNS, frozenset({"patient", "split", "fold"}))
    finder = Finder(table)
    entries: list[Entry] = []
    seen: dict[str, list[tuple[Path, str]]] = defaultdict(list)
    labels: dict[str, str] = {}
    for where, row in table.rows:
        split = row.get("split", TRAIN)
        if split.lower() not in _SPELLINGS:
            found = f"split {split!r} is not" if split else "no split; write"
            raise UserError(f"{where}: {found} one of {', '.join(_SPELLINGS)}")
        path = finder.find(where, row["path"])
        # Where file names ignore case, as on macOS, two spellings may name one file.
        twins = seen[one_form(os.path.normpath(path)).casefold()]
        for other, its_line in twins:
            if _same_file(path, other):
                raise UserError(f"{where}: {row['path']} is also in {its_line}; list it once")
        twins.append((path, where))
        label = one_form(row["label"])
        labels.setdefault(label, where)
        entries.append(
            Entry(
                path,
                label,
                _SPELLINGS[split.lower()],
                row.get("patient", ""),
                row.get("fold", ""),
            )
        )
    if not entries:
        raise UserError(f"{file} lists no images; add lines path,label")
    check_apart(labels)
    return Listing(file.parent, tuple(sorted(labels)), tuple(entries), notes=table.notes)


def _same_file(one: Path, other: Path) -> bool:
    """Whether two paths name one file, which need not exist."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return os.path.normpath(one) == os.path.normpath(other)


def _manifest_patients(root: Path, entries: Sequence[Entry]) -> tuple[dict[str, str], list[str]]:
    """Return the patients that manifest.csv gives, by the name of the image, and notes."""
    file = root / "manifest.csv"
    if not file.exists():
        return {}, []
    columns = {"path": _COLUMNS["path"], "patient": _COLUMNS["patient"]}
    table = read_table(file, columns, frozenset(columns))
    images = Spellings(_relative(entry.path, root) for entry in entries)
    patients: dict[str, str] = {}
    lost: list[str] = []
    for where, row in table.rows:
        written, patient = row.get("path", ""), row.get("patient", "")
        if not patient:
            continue
        name = images.find(written) or images.find(os.path.normpath(written.replace("\\", "/")))
        if name is None:
            if there := images.in_other_case(written):
                raise UserError(f"{where}: {written} does not exist; there is {there}: write it so")
            if not os.path.isfile(root / written):
                lost.append(f"{where.removeprefix(f'{file}, ')}: {written}")
        elif same_person(patients.setdefault(name, patient)) != same_person(patient):
            raise UserError(
                f"{where}: {written} has the patients {patients[name]} and {patient}; keep one"
            )
    notes = [*table.notes]
    if not any("patient" in row for _, row in table.rows):
        notes.append(f"{file.name} has no column patient: no patient is known from it")
    if lost:
        notes.append(
            f"{len(lost)} patients of {file.name} are not those of an image: {first(lost)}"
        )
    return patients, notes
