"""Names of files, classes and patients: forms for comparison, and errors for look-alikes."""

import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cached_property

from bstriplet.errors import UserError
from bstriplet.text import printable, utf8

# Cells without a value, as pandas, R and Excel write them: these in any case, those below only in
# the case shown, because NAT and Na may be classes. "none" is not listed: it may be a class.
_NOTHING = frozenset(
    {"nan", "-nan", "n/a", "<na>", "#n/a", "#na", "null"}
    | {"#value!", "#ref!", "#name?", "#div/0!", "#num!", "#null!"}
)
_NOTHING_AS_IT_STANDS = frozenset(("", "NA", "NaT"))
# Cyrillic and Greek letters, and the Latin letters that they look like.
_LOOKING_LATIN = str.maketrans(
    "АВЕЅІЈКМНОРСТУХасеіјорухѕΑΒΕΖΗΙΚΜΝΟΡΤΥΧο", "ABESIJKMHOPCTYXaceijopyxsABEZHIKMNOPTYXo"
)
# Hyphens and quotes of word processors, and Unicode's variation selectors.
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
    """Return the letters and digits of a name in lower case: "Non-Lyme" gives "nonlyme"."""
    return "".join(letter for letter in _composed(name).casefold() if letter.isalnum())


def same_person(patient: str) -> str:
    """Return the form in which patients are compared: that of names, without case."""
    return one_form(patient).casefold()


def says_nothing(value: str) -> bool:
    """Whether a cell means "no value" in pandas, R or Excel."""
    value = value.strip()
    return value.casefold() in _NOTHING or value in _NOTHING_AS_IT_STANDS


def _looks(name: str) -> tuple[str, str]:
    """Return two forms of a name; names that look alike share one of them.

    Names look alike if they differ only in case, in width, in invisible characters, in the sign for
    a hyphen or a quote, or in letters of other scripts that look Latin. The second form has Latin
    letters in place of those. The first form keeps them: in their other case, they may not look
    Latin.
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
    """Raise if two classes look alike; ``classes`` maps each name to the place it was found."""
    seen: dict[str, str] = {}
    for name, where in classes.items():
        for look in _looks(name):
            if (other := seen.setdefault(look, name)) != name:
                raise UserError(
                    f"classes {quoted(other, name)} ({printable(str(classes[other]))}) and "
                    f"{quoted(name, other)} ({printable(str(where))}) look alike; write both the "
                    "same, or give them names that are easy to tell apart"
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
    """Existing names, which can be found by another spelling."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)

    @cached_property
    def _by_form(self) -> dict[str, str | None]:
        return self._by(_form)

    @cached_property
    def _by_letters(self) -> dict[str, str | None]:
        return self._by(lambda name: _form(name).casefold())

    def _by(self, form: Callable[[str], str]) -> dict[str, str | None]:
        """Return the name of each form; None where several names have the same form."""
        found: dict[str, str | None] = {}
        for name in self._names:
            key = form(name)
            found[key] = None if key in found else name
        return found

    def find(self, name: str) -> str | None:
        """Return the existing name equal to ``name``, else the only one of the same form."""
        return name if name in self._names else self._by_form.get(_form(name))

    def in_other_case(self, name: str) -> str | None:
        """Return the only existing name that differs from ``name`` in case alone."""
        return self._by_letters.get(_form(name).casefold())
