"""What is kept is made again when anything that it is made of is another."""

from types import SimpleNamespace

import pytest
from kept import kept


def test_made_once_until_a_file_its_name_or_a_string_changes(tmp_path):
    cache = SimpleNamespace(mkdir=lambda name: tmp_path)
    request = SimpleNamespace(config=SimpleNamespace(cache=cache))
    source, made = tmp_path / "source.h", []

    def make(folder):
        made.append(folder)
        (folder / "found").write_text(str(len(made)))

    def found(*made_of):
        return (kept(request, "program", made_of, make) / "found").read_text()

    source.write_text("1")
    assert [found(source, "-O2"), found(source, "-O2")] == ["1", "1"]
    assert found(source, "-O3") == "2"
    source.write_text("2")
    assert found(source, "-O3") == "3"
    renamed = source.rename(tmp_path / "renamed.h")
    assert found(renamed, "-O3") == "4"
    assert len(list(tmp_path.glob("program-*"))) == 1


def test_nothing_is_kept_of_what_failed(tmp_path):
    cache = SimpleNamespace(mkdir=lambda name: tmp_path)
    request = SimpleNamespace(config=SimpleNamespace(cache=cache))

    def fail(folder):
        (folder / "half").write_text("")
        raise RuntimeError("no compiler")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="no compiler"):
            kept(request, "program", ["-O2"], fail)
    assert not list(tmp_path.iterdir())
