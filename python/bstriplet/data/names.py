"""Names of files, classes and patients: compared in one form, and told apart."""

import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cached_property

from bstriplet.errors import UserError
from bstriplet.text import printable, utf8

# How pandas, R and Excel write that there is no value: these in any case, those below only in this
# one, for NAT and Na may be classes (so may "none").
_NOTHING = frozenset(
    {"nan", "-nan", "n/a", "<na>", "#n/a", "#na", "null"}
    | {"#value!", "#ref!", "#name?", "#div/0!", "#num!", "#null!"}
)
_NOTHING_AS_IT_STANDS = frozenset(("", "NA", "NaT"))
# Letters of Cyrillic and Greek that look like these of Latin.
_LOOKING_LATIN = str.maketrans(
    "АВЕЅІЈКМНОРСТУХасеіјорухѕΑΒΕΖΗΙΚΜΝΟΡΤΥΧο", "ABESIJKMHOPCTYXaceijopyxsABEZHIKMNOPTYXo"
)
# What word processors write for a hyphen and for quotes, and the selectors of a character's look.
_PLAIN_SIGNS = str.maketrans(
    dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-")
    | dict.fromkeys("\u2018\u2019\u02bc", "'")
    | dict.fromkeys("\u201c\u201d\u201e", '"')
    | dict.fromkeys(map(chr, range(0xFE00, 0xFE10)), "")
)


def one_form(name: str) -> str:
    """Return the form in which names are compared: NFC, one plain space between words."""
    return name if name.isalnum() and name.isascii() else " ".join(_composed(name).split())


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def letters(name: str) -> str:
    """Return a name without case, spaces and signs: "Non-Lyme Disease" is "nonlymedisease"."""
    return "".join(letter for letter in _composed(name).casefold() if letter.isalnum())


def same_person(patient: str) -> str:
    """Return the form in which patients are compared: as names, and without case."""
    return one_form(patient).casefold()


def says_nothing(value: str) -> bool:
    """Whether a cell says that there is no value, as pandas, R or Excel write it."""
    value = value.strip()
    return value.casefold() in _NOTHING or value in _NOTHING_AS_IT_STANDS


def _looks(name: str) -> tuple[str, str]:
    """Return two forms: names that a reader takes for the same have one in common.

    Such names differ in case, in width, in characters that are not seen, in the sign for a hyphen
    or a quote, or in letters of other scripts that look like Latin ones. The second form has Latin
    letters for these; the first has not, for their other case may look like no Latin letter.
    """

    def look(spelled: str) -> str:
        compatible = unicodedata.normalize("NFKC", spelled).translate(_PLAIN_SIGNS)
        seen = "".join(letter for letter in compatible if unicodedata.category(letter) != "Cf")
        return one_form(seen).casefold()

    return look(name), look(name.translate(_LOOKING_LATIN))


def quoted(name: str, other: str) -> str:
    """Return ``name`` in quotes, with escapes where it would be hard to tell from ``other``."""
    by_case = _composed(name).casefold() == _composed(other).casefold()
    return repr(name) if by_case and _composed(name) == name else ascii(name)


def check_apart(classes: Mapping[str, object]) -> None:
    """Raise if two classes, given with where each stands, look like one."""
    seen: dict[str, str] = {}
    for name, where in classes.items():
        for look in _looks(name):
            if (other := seen.setdefault(look, name)) != name:
                raise UserError(
                    f"classes {quoted(other, name)} ({printable(str(classes[other]))}) and "
                    f"{quoted(name, other)} ({printable(str(where))}) look alike; write the one as "
                    "the other, or give them names that differ in more than this"
                )


def unknown_class(where: object, name: str, known: Collection[str]) -> UserError:
    """Return the error for an image of a class that is not among the training classes."""
    similar = [other for other in known if set(_looks(other)) & set(_looks(name))]
    hint = f" ({quoted(name, similar[0])} is not {quoted(similar[0], name)})" if similar else ""
    return UserError(
        f"{where}: class {name} is not among the training classes "
        f"({', '.join(sorted(known))}){hint}; rename or remove it"
    )


def _form(name: str) -> str:
    return one_form(utf8(name))


class Spellings:
    """Names that exist, to be found by another spelling."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)

    @cached_property
    def _by_form(self) -> dict[str, str | None]:
        return self._by(_form)

    @cached_property
    def _by_letters(self) -> dict[str, str | None]:
        return self._by(lambda name: _form(name).casefold())

    def _by(self, form: Callable[[str], str]) -> dict[str, str | None]:
        """Return the name of each form; None where several have it."""
        found: dict[str, str | None] = {}
        for name in self._names:
            key = form(name)
            found[key] = None if key in found else name
        return found

    def find(self, name: str) -> str | None:
        """Return the name as it exists: as it is, or the only one that is equal in one form."""
        return name if name in self._names else self._by_form.get(_form(name))

    def in_other_case(self, name: str) -> str | None:
        """Return the only name that differs from this one in case alone."""
        return self._by_letters.get(_form(name).casefold())
