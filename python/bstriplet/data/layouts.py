"""How data lie on the disk: sets of the paper as they are downloaded, class trees, CSV files."""

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

# Names of the columns of a CSV file; the first is the one to write.
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
# Pneumonia of bacteria and of viruses may be numbered separately, which cannot be told: one number
# is one patient here, so that no patient is on two sides of a split.
_CHEST2_PATIENT = re.compile(
    r"(person\d+)_|((?:NORMAL2-)?IM-\d+)-|(?:NORMAL|BACTERIA|VIRUS)-(\d+)-", re.IGNORECASE
)
_OSTEOSARCOMA_PATIENT = re.compile(r"(case-\d+|p\d+)-")

# Reasons to leave out, beside those of `files`.
BESIDE = "images beside the class folders were left out"
NOT_OPENED = "files or folders beside the images that cannot be opened were left out"
NO_PART = "folders of images beside those of the parts were left out"

LeftOut = dict[str, list[str]]

# The 16 images of Kaggle's folder val are in no table of the paper.
_CHEST2_VALIDATION = 16


class Entry(NamedTuple):
    """One image of a set; ``patient`` and ``fold`` are empty where nothing says them."""

    path: Path
    label: str
    part: str = TRAIN
    patient: str = ""
    fold: str = ""


@dataclass(frozen=True)
class PaperSet:
    """A data set of the paper as it is downloaded.

    name: that of :func:`bstriplet.paper.data_set`. layout: how the data are called, and from where.
    column: the column of the paper's table for a class folder.
    """

    name: str
    layout: str
    column: Callable[[str], str]

    @property
    def printed(self) -> paper.DataSet:
        """What the paper prints of it."""
        return paper.data_set(self.name)

    @property
    def table(self) -> str:
        """The table that counts its images."""
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
# Public notebooks read RashData/Train/Train_2_Cases and RashData/Validation/Validation_2_Cases, a
# public classifier of these images calls one class Lyme_Positive. No more could be checked, and
# the class folders may have any two names, of which one or both say Lyme.
RASH = PaperSet("rash", "rash (Kaggle sshikamaru/lyme-disease-rashes)", _rash_column)
OSTEOSARCOMA = PaperSet(
    "osteosarcoma", "osteosarcoma (TCIA Osteosarcoma-Tumor-Assessment)", lambda label: label
)
PAPER_SETS = {known.name: known for known in (CHEST1, CHEST2, RASH, OSTEOSARCOMA)}


@dataclass(frozen=True)
class Count:
    """Images of a class in a part (or ``"all"``) beside what the paper's table counts."""

    table: str
    part: str
    label: str
    found: int
    paper: int


@dataclass(frozen=True)
class Listing:
    """The images of a set before any of them is read.

    root: the folder that file names are relative to.
    known: the set of the paper that it is, or None.
    counts: found beside the paper's; empty for other sets.
    notes: what a reader should know.
    left_out: paths of what lies there and is not taken, by the reason.
    """

    root: Path
    classes: tuple[str, ...]
    entries: tuple[Entry, ...]
    known: PaperSet | None = None
    counts: tuple[Count, ...] = ()
    notes: tuple[str, ...] = ()
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def name(self, path: Path) -> str:
        """Return the path relative to the root, in POSIX spelling, where it lies below it."""
        return utf8(_relative(path, self.root))

    @property
    def left_out_notes(self) -> tuple[str, ...]:
        """What is left out, counted and named."""
        return counted(
            {reason: [self.name(Path(p)) for p in paths] for reason, paths in self.left_out.items()}
        )


def _relative(path: Path, root: Path) -> str:
    """Return ``path`` from ``root`` on, in POSIX spelling; all of it where it lies elsewhere.

    By string: for 100,000 files, pathlib would take longer than all else.
    """
    return str(path).removeprefix(f"{root}{os.sep}").replace(os.sep, "/")


def recognise(data: str) -> Listing:
    """Return the images of a folder or a CSV file, for training.

    A folder is one of the paper's sets as Kaggle, Mendeley or TCIA deliver it (the rash images: as
    notebooks on Kaggle read them), or any tree train/CLASS/*, with test/CLASS/* and val/CLASS/*
    where there are such (in any case; Training, Testing, Valid, Validation too). A manifest.csv in
    it with columns file and patient names patients. CSV files may be as spreadsheets write them
    (:func:`bstriplet.data.tables.read_table`).
    """
    if is_csv(data):
        return _checked(_read_csv(Path(data)))
    folder = _existing_folder(data)
    return _checked(_osteosarcoma(folder) or _tree(folder))


def recognise_test(data: str) -> Listing:
    """Return the images to test a finished model on: those of the test part, where there is one.

    Else all: of a CSV file, of the osteosarcoma set, or of a folder CLASS/*.
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
    """Return ``data`` as a path after checking that it is a folder with something in it."""
    root = Path(data)
    if not os.path.exists(root):
        raise UserError(f"data folder {root} does not exist; give an existing one with --data")
    if not os.path.isdir(root):
        raise UserError(f"{root} is neither a folder nor a .csv or .npz file; give one of these")
    if not entries_of(root):
        raise UserError(f"data folder {root} is empty; lay images out as train/CLASS/*")
    return root


def _checked(listing: Listing) -> Listing:
    """Return the listing if a model can be trained on it."""
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
    """Return the folders in ``folder``, without hidden ones and those of the system."""
    return [path for path in entries_of(folder) if path.is_dir() and not why_left_out(path.name)]


def _parts(folder: Path) -> dict[str, Path]:
    """Return the folders of the parts that lie in ``folder``, however they are spelled."""
    found: dict[str, Path] = {}
    for path in _folders(folder):
        part = _SPELLINGS.get(path.name.lower())
        if part in found:
            raise UserError(f"{folder} has two folders for {part}: {found[part].name}, {path.name}")
        if part:
            found[part] = path
    return {part: found[part] for part in PARTS if part in found}


def _unwrap(folder: Path, is_root: Callable[[Path], bool]) -> Path | None:
    """Return ``folder``, or the one at most three levels below it that archives wrap in others."""
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
    if known is RASH and TEST not in parts:  # what is delivered as Validation tests in the paper
        entries = [e._replace(part=TEST) if e.part == VALIDATION else e for e in entries]
    listed = tuple(
        entry._replace(patient=patients.get(_relative(entry.path, root), "")) for entry in entries
    )
    counts = _count_parts(listed, known) if known else ()
    return Listing(root, classes, listed, known, counts, (*notes, *_differences(counts)), left_out)


def _known_set(classes: Sequence[str], entries: Sequence[Entry]) -> PaperSet | None:
    """Return the set of the paper that has such classes, or None."""
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
    """Return the images of a tree CLASS/*, or of the parts of a larger one."""
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
    """Add images beside the way from ``folder`` to ``inner``, and in ``inner`` beside ``used``.

    Without ``used``, ``inner`` holds class folders, all of which are used.
    """
    used = used or _folders(inner)
    way = [above for above in (inner, *inner.parents) if above.is_relative_to(folder)]
    for here in way:
        for path in entries_of(here):
            if path in used or path in way:
                continue
            try:
                reason, name = _what_is_beside(path)
            except UserError:  # it is no part of the data, and need not be read
                reason, name = NOT_OPENED, str(path)
            if reason:
                left_out[reason].append(name)


def _what_is_beside(path: Path) -> tuple[str, str]:
    """Return why a file or folder beside the data is left out, and its name; "" for no image."""
    if not path.is_dir():
        reason = why_no_image(str(path)) or BESIDE
        return (reason if reason in (BESIDE, NOWHERE) else ""), str(path)
    if reason := why_left_out(path.name):
        name = counted_folder(str(path))
        return ("" if name == str(path) else reason), name
    count = len(list_images(path).images)
    return (NO_PART if count else ""), f"{path} ({count} images)"


def _class_folders(folder: Path, part: str, left_out: LeftOut) -> Iterator[Entry]:
    """Yield the images of each class folder in ``folder``; one without images is an error."""
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
    """Return the osteosarcoma tiles by the table beside them; None if ``folder`` is another set."""

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
    """Return a name in lower case with a dash for whatever separates its words."""
    return re.sub("[^a-z0-9]+", "-", name.lower().removesuffix(".jpg")).strip("-")


# --- counts ---------------------------------------------------------------------------------------


def _count_parts(entries: Iterable[Entry], known: PaperSet) -> tuple[Count, ...]:
    """Return the images of each class and part beside those of the paper."""
    found = Counter((entry.part, known.column(entry.label)) for entry in entries)
    return tuple(
        Count(known.table, part, label, found[part, label], printed[label])
        for label in known.printed.classes
        for part, printed in known.printed.counts.items()
    )


def _differences(counts: Sequence[Count]) -> tuple[str, ...]:
    """Return a note on the counts that are not the paper's."""
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
        # Where case does not count, as on macOS, two spellings lead to one file.
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
    """Whether two paths lead to one file, or would if it were there."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return os.path.normpath(one) == os.path.normpath(other)


def _manifest_patients(root: Path, entries: Sequence[Entry]) -> tuple[dict[str, str], list[str]]:
    """Return the patient of each image that manifest.csv names, by its name there, and notes."""
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
