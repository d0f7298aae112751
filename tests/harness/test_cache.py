"""The cache of decoded images: keyed by content; files that change or vanish; a full disk."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from bstriplet.data import cache as image_cache
from bstriplet.data import images
from bstriplet.data.cache import Item, decode, file_digests
from bstriplet.data.images import read_image
from bstriplet.errors import UserError
from PIL import Image
from quick import snapshot


def make_images(folder: Path, count: int, colour_at: int | None = None) -> list[Path]:
    folder.mkdir()
    generator = np.random.default_rng(0)
    paths = []
    for number in range(count):
        pixels = generator.integers(0, 256, (12, 12, 3), dtype=np.uint8)
        if number != colour_at:
            pixels[:] = pixels[..., :1]
        paths.append(folder / f"{number:03d}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths


def saved(pixels: np.ndarray) -> bytes:
    stream = BytesIO()
    np.save(stream, pixels)
    return stream.getvalue()


def pretend(monkeypatch: pytest.MonkeyPatch, file: Path, name: str, value: int) -> None:
    """Freeze the status of a file as it is now, except for one number."""
    real, status = os.stat, os.stat(file)
    numbers = {key: getattr(status, key) for key in dir(status) if key.startswith("st_")}

    def stat(path: Any, **options: Any) -> Any:
        if path == file:
            return SimpleNamespace(**numbers | {name: value})
        return real(path, **options)

    monkeypatch.setattr(os, "stat", stat)


@pytest.mark.parametrize("colour_at", [None, 0, 6, 12])
def test_one_colour_image_makes_the_set_rgb(tmp_path: Path, colour_at: int | None) -> None:
    paths = make_images(tmp_path / "set", 13, colour_at)
    channels = 1 if colour_at is None else 3
    pixels = decode(paths, 16).pixels
    assert pixels.shape == (13, channels, 16, 16)
    for path, row in zip(paths, pixels, strict=True):
        np.testing.assert_array_equal(row, read_image(path, 16, channels).pixels)


def test_images_are_decoded_once_whatever_they_are_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make_images(tmp_path / "set", 5)
    first = decode(paths, 16)
    monkeypatch.setattr(images, "decode_image", None)  # decoding again would fail
    os.utime(paths[0])
    shutil.copytree(tmp_path / "set", tmp_path / "copy")
    again = decode([tmp_path / "copy" / path.name for path in paths], 16)
    assert again.key == first.key
    np.testing.assert_array_equal(again.pixels, first.pixels)


def test_changed_content_is_decoded_anew_even_at_the_same_time_and_size(tmp_path: Path) -> None:
    paths = make_images(tmp_path / "set", 3)
    before = decode(paths, 16)
    times = (paths[0].stat().st_atime_ns, paths[0].stat().st_mtime_ns)
    paths[0].write_bytes(paths[1].read_bytes())
    os.utime(paths[0], ns=times)
    after = decode(paths, 16)
    assert after.key != before.key
    np.testing.assert_array_equal(after.pixels[0], before.pixels[1])


def test_size_channels_and_version_have_their_own_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make_images(tmp_path / "set", 3)
    keys = {decode(paths, 16).key, decode(paths, 17).key, decode(paths, 16, 3).key}
    monkeypatch.setattr(image_cache, "CACHE_VERSION", 0)
    assert len(keys | {decode(paths, 16).key}) == 4


def test_the_same_images_in_another_order_are_not_mistaken(tmp_path: Path) -> None:
    paths = make_images(tmp_path / "set", 3)
    first = decode(paths, 16).pixels
    np.testing.assert_array_equal(decode(paths[::-1], 16).pixels, first[::-1])


@pytest.mark.parametrize(
    "looks",
    [
        (
            (500, 3, [0, 1]),  # nothing is cached yet
            (899, 0, [0, 1]),  # refuses the same image
            (900, 3, [0, 1, 2]),
            (900, 0, [0, 1, 2]),
            (400, 0, [0, 1]),
            (399, 3, [0]),
            (500, 0, [0, 1]),
            (0, 3, [0, 1, 2]),
        ),
        ((50, 3, []), (99, 0, []), (100, 3, [0]), (400, 3, [0, 1]), (0, 3, [0, 1, 2])),
        ((900, 3, [0, 1, 2]), (0, 0, [0, 1, 2]), (899, 3, [0, 1])),
    ],
)
def test_another_limit_of_pixels_decodes_again_only_where_it_decides(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    looks: tuple[tuple[int, int, list[int]], ...],
) -> None:
    """Images of 100, 400 and 900 pixels, under limits between them, in any order."""
    paths = [tmp_path / f"{side}.png" for side in (10, 20, 30)]
    for path in paths:
        Image.new("L", (int(path.stem), int(path.stem)), 7).save(path)
    n_decoded = 0
    whole = images.decode_image

    def counting(*arguments: Any) -> images.Picture:
        nonlocal n_decoded
        n_decoded += 1
        return whole(*arguments)

    monkeypatch.setattr(images, "decode_image", counting)
    keys = set()
    for max_pixels, decoded, readable in looks:
        n_decoded = 0
        result = decode(paths, 8, 1, max_pixels)
        assert n_decoded == decoded, max_pixels
        assert [i for i in range(3) if i not in result.broken] == readable
        assert (result.pixels[readable] == 7).all()
        keys.add(result.key)
    assert len(keys) == 1  # it names the content, whichever limit came first


def test_decoding_that_is_cut_leaves_nothing_to_be_mistaken(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make_images(tmp_path / "set", 4)
    whole, third = images.decode_image, paths[2].read_bytes()

    def cut(content: bytes, size: int, channels: int | None, max_pixels: int) -> images.Picture:
        if content == third:
            raise KeyboardInterrupt
        return whole(content, size, channels, max_pixels)

    monkeypatch.setattr(images, "decode_image", cut)
    with pytest.raises(KeyboardInterrupt):
        decode(paths, 16)
    assert not snapshot(cache)
    monkeypatch.setattr(images, "decode_image", whole)
    assert not decode(paths, 16).broken


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    """A limit of 4 kB per file stands for the disk; a memory map would be killed by SIGBUS."""
    paths = make_images(tmp_path / "set", 20)
    program = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from bstriplet.data.cache import decode\n"
        "from bstriplet.errors import UserError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: decode([Path(name) for name in sys.argv[1:]], 16)\n"
        "except UserError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, paths)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "File too large" in done.stdout
    assert "has room" in done.stdout
    assert not snapshot(cache)


def test_a_file_that_vanishes_before_it_is_decoded_is_broken_and_not_mistaken_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make_images(tmp_path / "set", 4)
    content = paths[1].read_bytes()
    whole = images.read_content

    def read(path: Path) -> bytes:
        paths[1].unlink(missing_ok=True)
        return whole(path)

    monkeypatch.setattr(images, "read_content", read)
    without = decode(paths, 16)
    assert without.broken == {1: "not found"}
    monkeypatch.setattr(images, "read_content", whole)
    paths[1].write_bytes(content)
    restored = decode(paths, 16)
    assert not restored.broken
    assert restored.key != without.key
    np.testing.assert_array_equal(restored.pixels[1], read_image(paths[1], 16).pixels)


def test_a_file_that_appears_before_it_is_decoded_is_not_mistaken_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make_images(tmp_path / "set", 3)
    content = paths[1].read_bytes()
    paths[1].unlink()
    whole = images.read_content

    def read(path: Path) -> bytes:
        if path == paths[1]:
            path.write_bytes(content)
        return whole(path)

    monkeypatch.setattr(images, "read_content", read)
    assert not decode(paths, 16).broken
    monkeypatch.setattr(images, "read_content", whole)
    paths[1].unlink()
    assert decode(paths, 16).broken == {1: "not found"}


def test_what_cannot_be_decoded_has_its_digest_and_pixels_of_zero(tmp_path: Path) -> None:
    paths = make_images(tmp_path / "set", 3)
    paths[0].write_text("no image")
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    paths[2].unlink()
    decoded = decode(paths, 16)
    assert decoded.broken == {0: "not an image", 2: "not found"}
    assert not decoded.pixels[[0, 2]].any()
    assert decoded.digests == [*digests[:2], ""]


def test_two_that_decode_the_same_at_one_time_both_have_it(cache: Path) -> None:
    def items(channels: int | None) -> Iterator[Item]:
        yield Item(np.full((1, 8, 8), 7, np.uint8), "digest")

    def read(channels: int | None) -> Iterator[Item]:
        assert len(list((cache / "images").iterdir())) == 1  # where it is made: on the same disk
        assert not image_cache.cached(["content"], 1, 8, 1, items).broken
        yield from items(channels)

    assert (image_cache.cached(["content"], 1, 8, 1, read).pixels == 7).all()
    assert len(list((cache / "images").iterdir())) == 1


def test_a_file_that_keeps_changing_is_an_error_that_names_it(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make_images(tmp_path / "set", 3)
    whole = images.read_content

    def read(path: Path) -> bytes:
        return whole(path) + (b"more" if path == paths[2] else b"")

    monkeypatch.setattr(images, "read_content", read)
    with pytest.raises(UserError, match=r"002\.png changes while it is read"):
        decode(paths, 16)
    assert not snapshot(cache)


def test_decoded_images_outlive_their_files(tmp_path: Path) -> None:
    paths = make_images(tmp_path / "set", 3)
    decoded = decode(paths, 16)
    with pytest.raises(ValueError, match="read-only"):
        decoded.pixels[0] = 0
    assert isinstance(decoded.pixels, np.memmap)
    expected = np.array(decoded.pixels)
    shutil.rmtree(tmp_path / "set")
    np.testing.assert_array_equal(decoded.pixels, expected)


def test_files_that_rest_are_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = make_images(tmp_path / "set", 5)
    monkeypatch.setattr(image_cache, "SETTLED_NS", -(10**12))  # as if written long ago
    first = file_digests(paths)
    hashed: list[Path] = []
    whole = image_cache._hash_file

    def hash_file(path: Path) -> str:
        hashed.append(path)
        return whole(path)

    monkeypatch.setattr(image_cache, "_hash_file", hash_file)
    assert file_digests(paths) == first
    assert file_digests(paths[1:]) == first[1:]
    assert not hashed
    times = (paths[0].stat().st_atime_ns, paths[0].stat().st_mtime_ns)
    paths[0].write_bytes(paths[0].read_bytes()[::-1])
    os.utime(paths[0], ns=times)  # same size, same time of modification
    changed = file_digests(paths)
    assert file_digests(paths) == changed
    assert hashed == paths[:1]
    assert changed[0] != first[0]
    assert changed[1:] == first[1:]
    paths[3].unlink()
    assert file_digests(paths) == [*changed[:3], "", changed[4]]


def test_paths_from_here_and_from_the_root_go_together(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make_images(tmp_path / "set", 2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(image_cache, "SETTLED_NS", -(10**12))
    digests = file_digests(paths)
    from_here = [path.relative_to(tmp_path) for path in paths]
    assert file_digests([paths[0], from_here[1]]) == file_digests(from_here) == digests
    assert len(list((cache / "index").iterdir())) == 1  # one for each folder of data
    file_digests(make_images(tmp_path / "other", 2))
    assert len(list((cache / "index").iterdir())) == 2


def test_images_on_several_drives_of_windows_go_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(paths: object) -> str:
        raise ValueError("Paths don't have the same drive")

    paths = make_images(tmp_path / "set", 2) + make_images(tmp_path / "other", 1)
    digests = file_digests(paths)
    monkeypatch.setattr(os.path, "commonpath", refuse)
    assert file_digests(paths) == digests


def test_files_whose_names_are_not_utf_8_are_hashed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        paths = make_images(tmp_path / "caf\udce9", 2)
    except (OSError, UnicodeEncodeError):
        pytest.skip("this file system takes UTF-8 alone")
    monkeypatch.setattr(image_cache, "SETTLED_NS", -(10**12))
    digests = file_digests(paths)
    monkeypatch.setattr(image_cache, "_hash_file", None)  # hashing again would fail
    assert file_digests(paths) == digests


@pytest.mark.parametrize("name", ["st_size", "st_mtime_ns", "st_ctime_ns", "st_ino"])
def test_a_change_that_one_number_of_its_status_tells_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    paths = make_images(tmp_path / "set", 2)
    monkeypatch.setattr(image_cache, "SETTLED_NS", -(10**12))
    before = file_digests(paths)
    pretend(monkeypatch, paths[0], name, getattr(paths[0].stat(), name) + 1)
    paths[0].write_bytes(paths[1].read_bytes())
    assert file_digests(paths) == [before[1]] * 2


def test_files_that_have_just_been_written_are_hashed_again(tmp_path: Path, cache: Path) -> None:
    file_digests(make_images(tmp_path / "set", 2))
    assert not snapshot(cache)


@pytest.mark.parametrize("name", ["st_mtime_ns", "st_ctime_ns"])
def test_a_file_is_fresh_where_one_of_its_times_is(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (path,) = make_images(tmp_path / "set", 1)
    monkeypatch.setattr(image_cache, "SETTLED_NS", -(10**12))
    pretend(monkeypatch, path, name, path.stat().st_mtime_ns + 2 * 10**12)
    file_digests([path])
    assert not snapshot(cache)


def test_a_file_that_could_not_be_opened_or_found_is_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make_images(tmp_path / "set", 3)
    monkeypatch.setattr(image_cache, "SETTLED_NS", -(10**12))
    expected = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    allowed, stat = Path.open, os.stat

    def refused(file: Path, mode: str) -> Any:
        if file == paths[1]:
            raise PermissionError(13, "Permission denied")
        return allowed(file, mode)

    def lost(file: Any, **options: Any) -> Any:
        if file == paths[2]:
            raise PermissionError(13, "Permission denied")
        return stat(file, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refused)
        patch.setattr(os, "stat", lost)
        assert file_digests(paths) == [expected[0], "", expected[2]]
    assert file_digests(paths) == expected


def test_a_damaged_index_is_made_anew(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make_images(tmp_path / "set", 2)
    monkeypatch.setattr(image_cache, "SETTLED_NS", -(10**12))
    digests = file_digests(paths)
    (index,) = (cache / "index").iterdir()
    index.write_bytes(index.read_bytes()[:100])
    assert file_digests(paths) == digests
    assert index.stat().st_size > 100


def test_an_index_that_cannot_be_written_only_costs_time(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: str, target: Path) -> None:
        raise PermissionError(13, "Permission denied", source)

    paths = make_images(tmp_path / "set", 2)
    monkeypatch.setattr(image_cache, "SETTLED_NS", -(10**12))
    monkeypatch.setattr(os, "replace", refuse)
    expected = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    assert file_digests(paths) == expected
    assert not snapshot(cache)


def test_an_unusable_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = make_images(tmp_path / "set", 2)
    monkeypatch.setenv("BSTRIPLET_CACHE", str(paths[0] / "below_a_file"))
    with pytest.raises(UserError, match=r"000\.png.below_a_file: .*BSTRIPLET_CACHE"):
        decode(paths, 16)


def test_a_folder_for_the_cache_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = make_images(tmp_path / "set", 2)
    for settled_ns, made in ((10**15, "images"), (-(10**12), "index")):
        monkeypatch.setattr(image_cache, "SETTLED_NS", settled_ns)
        monkeypatch.setenv("BSTRIPLET_CACHE", str(tmp_path / f"for/{made}"))
        assert not decode(paths, 16).broken
        assert (tmp_path / f"for/{made}" / made).is_dir()


def test_a_cache_in_which_nothing_can_be_renamed_is_named(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied", str(source))

    paths = make_images(tmp_path / "set", 2)
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(UserError, match="Permission denied; set BSTRIPLET_CACHE"):
        decode(paths, 16)
    assert not snapshot(cache)


@pytest.mark.parametrize(
    ("chosen", "of_the_system", "folder"),
    [
        ("~/here", "", "home/here"),
        ("~/here", "~/caches", "home/here"),
        ("", "~/caches", "home/caches/bstriplet"),
        (None, "", "home/.cache/bstriplet"),
        (None, None, "home/.cache/bstriplet"),
    ],
)
def test_the_cache_lies_where_the_environment_says(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    chosen: str | None,
    of_the_system: str | None,
    folder: str,
) -> None:
    home = str(tmp_path / "home")
    values = {"BSTRIPLET_CACHE": chosen, "XDG_CACHE_HOME": of_the_system,
              "HOME": home, "USERPROFILE": home}  # fmt: skip
    for name, value in values.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert image_cache.cache_folder() == tmp_path / folder


@pytest.mark.parametrize(
    ("name", "content"),
    [("pixels.npy", b"damaged"), ("pixels.npy", b""), ("pixels.npy", None), ("about.json", b"[]"),
     ("about.json", b"{}"), ("about.json", b""), ("about.json", None),
     ("about.json", b'{"broken": []}'), ("pixels.npy", saved(np.zeros((1, 1, 16, 16), np.uint8))),
     ("about.json", b'{"broken": {}, "patients": {}, "notes": {}, "digests": [], "limits": {}}')],
)  # fmt: skip
def test_a_damaged_cache_is_named(
    tmp_path: Path, cache: Path, name: str, content: bytes | None
) -> None:
    paths = make_images(tmp_path / "set", 2)
    key = decode(paths, 16).key
    file = cache / "images" / key / name
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=f"{key} is damaged; delete that folder"):
        decode(paths, 16)


def test_a_cached_file_that_cannot_be_opened_is_not_said_to_be_damaged(
    tmp_path: Path, cache: Path
) -> None:
    paths = make_images(tmp_path / "set", 2)
    about = cache / "images" / decode(paths, 16).key / "about.json"
    about.unlink()
    about.mkdir()
    with pytest.raises(UserError, match="set BSTRIPLET_CACHE"):
        decode(paths, 16)
