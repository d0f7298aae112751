"""What is kept is made again when anything that it is made of is another."""

import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from kept import kept


@pytest.fixture
def request_of(tmp_path):
    """What `kept` asks of pytest's request: a cache, in tmp_path."""
    cache = SimpleNamespace(mkdir=lambda name: tmp_path)
    return SimpleNamespace(config=SimpleNamespace(cache=cache))


def test_made_once_until_a_file_its_name_or_a_string_changes(request_of, tmp_path):
    source, made = tmp_path / "source.h", []

    def make(folder):
        made.append(folder)
        (folder / "found").write_text(str(len(made)))

    def found(*made_of):
        return (kept(request_of, "program", made_of, make) / "found").read_text()

    source.write_text("1")
    assert [found(source, "-O2"), found(source, "-O2")] == ["1", "1"]
    assert found(source, "-O3") == "2"
    source.write_text("2")
    assert found(source, "-O3") == "3"
    renamed = source.rename(tmp_path / "renamed.h")
    assert found(renamed, "-O3") == "4"
    assert len(list(tmp_path.glob("program-*"))) == 1


def test_a_second_worker_waits_and_makes_nothing(request_of):
    made = []

    def make(folder):
        made.append(folder)
        time.sleep(0.2)
        (folder / "found").touch()

    with ThreadPoolExecutor(2) as workers:
        found = list(workers.map(lambda _: kept(request_of, "program", ["-O2"], make), range(2)))
    assert len(made) == 1
    assert found[0] == found[1]
    assert (found[0] / "found").is_file()


def test_nothing_is_kept_of_what_failed(request_of, tmp_path):
    def fail(folder):
        (folder / "half").write_text("")
        raise RuntimeError("no compiler")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="no compiler"):
            kept(request_of, "program", ["-O2"], fail)
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]
