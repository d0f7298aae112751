"""Pictures, pages, targets and constants: all from rows alone."""

from collections import defaultdict
from dataclasses import replace

import pytest
from made_up import BYTE_S, CALL_S, FLOP_S

from bench import calibrate, figures, readme, table, targets
from bench.machine import ROOT


@pytest.fixture
def folder(made_up_rows, tmp_path):
    """One device's folder with a file for each suite."""
    by_suite = defaultdict(list)
    for row in made_up_rows:
        by_suite[row.suite].append(row)
    for name, rows in by_suite.items():
        table.write(tmp_path / "cpu-test" / f"{name}.csv", rows)
    return tmp_path / "cpu-test"


def test_every_picture_is_drawn_from_the_files(folder):
    drawn = figures.draw_all(folder)
    assert {path.stem for path in drawn} == {name for name, *_ in figures._PICTURES}
    assert all(path.stat().st_size > 8000 for path in drawn)


def test_pictures_of_suites_that_were_not_measured_are_left_out(folder):
    for path in folder.glob("*.csv"):
        if path.stem != "crossover":
            path.unlink()
    assert [path.name for path in figures.draw_all(folder)] == ["crossover.png"]


def test_targets_are_judged(made_up_rows):
    found = {(v.work, v.claim): v for v in targets.verdicts(made_up_rows)}
    paper = found["N = 36, D = 1,280, C = 3", "times faster than the naive form"]
    assert paper.figure == pytest.approx(8)
    assert paper.is_met
    floor = found["N = 36, D = 1,280, C = 3", "time, over empty function + products of pairs"]
    assert floor.figure == pytest.approx(4 / 3)
    assert floor.is_met
    big = found["N = 4,096, D = 128, C = 3", "times faster than the naive form"]
    assert big.figure < 100
    assert big.is_met is False
    memory = found["N = 1,048,576, D = 128, C = 10", "peak extra memory, over the embeddings"]
    assert memory.figure == pytest.approx(5 / 4)
    work = "N = 65,536, D = 128, C = 8,192"
    counted = found[
        work, "time, over that of the FLOPs the plan counts at the rate of products of moments"
    ]
    assert counted.figure == pytest.approx(2)  # both count the same FLOPs here
    assert counted.is_met is False
    growth = found["N = 262,144, D = 128, C = 10", "time, over that of half the rows"]
    assert growth.figure == pytest.approx(3)
    assert growth.is_met is False
    choices = targets.choices(made_up_rows)
    assert [ratio for ratio, _ in choices] == pytest.approx([1] * 60)
    assert {row.provider for _, row in choices} == {"auto"}
    assert found["60 points (N, D, C)", "auto over the best single path, at worst"].is_met


def test_the_worst_choice_is_of_the_whole_grid(made_up_rows):
    partly = [row for row in made_up_rows if row.suite != "crossover" or row.n < 100]
    (grid,) = (v for v in targets.verdicts(partly) if "single path" in v.claim)
    assert targets.choices(partly)
    assert grid.figure is None


def test_a_part_of_a_suite_is_never_taken_for_the_whole(folder, monkeypatch):
    whole = table.read(folder / "paper.csv")
    table.write(table.partial(folder / "paper.csv"), whole[:3])
    assert len([r for r in table.read_device(folder) if r.suite == "paper"]) == len(whole)
    assert "not complete" not in readme.page(folder)
    (folder / "paper.csv").unlink()
    with pytest.warns(UserWarning, match="not complete: paper"):
        rows = table.read_device(folder)
    assert len([row for row in rows if row.suite == "paper"]) == 3
    with pytest.warns(UserWarning, match="not complete"):
        texts = readme.page(folder), readme.targets_page(folder.parent)
    assert all("**not complete: paper**" in text for text in texts)
    titles = []
    save = figures.Figure.savefig
    monkeypatch.setattr(
        figures.Figure, "savefig",
        lambda figure, path: titles.append(figure.get_suptitle()) or save(figure, path),
    )  # fmt: skip
    with pytest.warns(UserWarning, match="not complete"):
        figures.draw_all(folder)
    assert [title.endswith("paper not complete") for title in titles].count(True) == 1


def test_a_target_that_was_not_measured_is_not_met_by_silence():
    assert {v.is_met for v in targets.verdicts([])} == {None}
    assert targets.choices([]) == []


def test_gpu_targets_look_at_both_modes(made_up_rows):
    rows = [replace(row, mode=mode) for row in made_up_rows for mode in (table.EAGER, table.GRAPH)]
    found = {v.claim: v for v in targets.verdicts(rows)}
    assert "times faster than the naive form, graph replay" in found
    assert found["milliseconds (on an H200), graph replay"].is_met is None
    rows = [replace(row, device="NVIDIA H200") for row in rows]
    assert {v.claim: v for v in targets.verdicts(rows)}[
        "milliseconds (on an H200), graph replay"
    ].figure > 0


def test_targets_set_devices_side_by_side(folder, monkeypatch):
    monkeypatch.setattr(readme, "TARGETS", folder.parent / "TARGETS.md")
    text = readme.targets_page(folder.parent)
    assert "- [test machine](cpu-test/README.md): " in text
    assert "| N = 36, D = 1,280, C = 3 | times faster than the naive form | >= 5 | 8 |" in text
    assert ": missed**" in text
    assert "\n- products of pairs: " in text
    for path in folder.glob("*.csv"):
        rows = [replace(row, device="second machine") for row in table.read(path)]
        table.write(folder.parent / "cpu-test-2" / path.name, rows)
    text = readme.targets_page(folder.parent)
    assert "- [second machine](cpu-test-2/README.md): " in text
    assert "| work | figure | target | test machine | second machine |" in text
    assert "| N = 36, D = 1,280, C = 3 | times faster than the naive form | >= 5 | 8 | 8 |" in text


def test_section_has_five_sizes_and_a_column_pair_for_each_gpu(folder, monkeypatch):
    monkeypatch.setattr(readme, "README", folder.parent / "README.md")
    for path in folder.glob("*.csv"):
        rows = [replace(row, device="test GPU") for row in table.read(path) if row.n < 1 << 20]
        table.write(folder.parent / "cuda-test" / path.name, rows)
    refused = [
        replace(row, status="out of memory at N = 131072", p50_ms=None, peak_bytes=None)
        if (row.provider, row.n) == ("naive", 1 << 20) else row
        for row in table.read(folder / "sweep.csv")
    ]  # fmt: skip
    table.write(folder / "sweep.csv", refused)
    text = readme.section(folder.parent)
    assert "missed" not in text
    assert "**" not in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 5
    head, paper, million = (lines[i].strip("| ").split(" | ") for i in (0, 2, -1))
    assert head[6:] == ["test GPU", "test GPU, naive"]
    assert "on test machine, and in the last columns on test GPU." in text
    assert paper == [
        "36, 1,280, 3", "55 µs", "440 µs", "220 µs", "180 KiB", "180 KiB", "55 µs", "440 µs"
    ]  # fmt: skip
    assert million[2] == "does not fit"
    assert million[5:] == ["does not fit", "-", "-"]
    found = readme.step_shares(table.read_device(folder))
    ours = [100 * share for _, share, _ in found]
    assert f"{min(ours):.2f} % (`" in text
    assert f"{max(ours):.2f} % (`" in text


def test_a_reader_is_not_told_that_liger_has_an_infonce(folder):
    rows = [replace(row, provider="Liger InfoNCE", status=table.OK, p50_ms=1e-3, p20_ms=1e-3,
                    p80_ms=1e-3) if row.group == "peer" else row
            for row in table.read(folder / "paper.csv")]  # fmt: skip
    table.write(folder / "paper.csv", rows)
    text = readme.page(folder)
    assert "| InfoNCE by Liger's linear cross entropy | " in text
    assert "\n- InfoNCE by Liger's linear cross entropy: built here" in text
    assert "Liger InfoNCE" not in text


def test_page_has_one_devices_tables_and_links_its_files(folder):
    drawn = figures.draw_all(folder)
    text = readme.page(folder)
    assert all(f"]({path.name})" in text for path in (*drawn, *folder.glob("*.csv")))
    assert text.startswith("# test machine\n")
    assert text.index("D = 1,280, ten classes:") < text.rindex("| 1,048,576 |")
    assert "| 1,048,576 |" in text
    assert "out of memory" in text
    assert "efficientnet_b1" in text
    assert readme.page(folder) == text


def test_section_without_results_says_so(tmp_path):
    assert "make bench" in readme.section(tmp_path)


def test_check_fails_when_the_readme_differs(folder, tmp_path, monkeypatch, capsys):
    page = tmp_path / "front" / "README.md"
    page.parent.mkdir()
    page.write_text(f"# Title\n\n{readme.START}\nold\n{readme.END}\n\ntail\n")
    monkeypatch.setattr(readme, "README", page)
    monkeypatch.setattr(readme, "TARGETS", tmp_path / "TARGETS.md")
    monkeypatch.setattr(readme, "RESULTS", folder.parent)
    assert readme.main(["--check"]) == 1
    assert "old" in page.read_text()
    assert readme.main([]) == 0
    assert readme.main(["--check"]) == 0
    assert (folder / "README.md").read_text() == readme.page(folder)
    (folder / "README.md").write_text("other")
    assert readme.main(["--check"]) == 1
    assert str(folder / "README.md") in capsys.readouterr().err
    assert readme.main([]) == 0
    (tmp_path / "TARGETS.md").write_text("other")
    assert readme.main(["--check"]) == 1
    assert str(tmp_path / "TARGETS.md") in capsys.readouterr().err
    assert readme.main([]) == 0
    text = page.read_text()
    assert text.startswith("# Title\n\n")
    assert text.endswith(f"{readme.END}\n\ntail\n")
    page.write_text("no markers")
    assert readme.main([]) == 1
    assert readme.START in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ms", "text"), [(0.0123, "12.3 µs"), (0.5, "500 µs"), (2.345, "2.35 ms"), (61000, "61 s")]
)
def test_times_have_three_digits(ms, text):
    assert table.milliseconds(ms) == text


def test_calibration_finds_the_constants_that_made_the_rows(made_up_rows):
    fits = calibrate.fit_paths(calibrate.usable(made_up_rows))
    assert set(fits) == {"native", "gram"}
    found = fits["native"].constants
    assert found.call == pytest.approx(CALL_S, rel=1e-3)
    assert found.flop == pytest.approx(FLOP_S, rel=1e-3)
    assert found.byte == pytest.approx(BYTE_S, rel=1e-3)
    assert fits["native"].worst < 1.001


def test_calibration_writes_a_module_that_python_reads(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(calibrate, "TARGET", tmp_path / "calibration.py")
    monkeypatch.setattr(calibrate, "ROOT", tmp_path)
    monkeypatch.setattr(calibrate, "CONSTANTS", {})
    assert calibrate.main([str(folder)]) == 0
    scope = {"__package__": "bstriplet_kernels"}
    exec((tmp_path / "calibration.py").read_text(), scope)
    assert scope["CONSTANTS"]["cpu"]["native"].call == pytest.approx(CALL_S, rel=1e-2)
    assert "cpu native: 20.0 µs a call, 100.0 GFLOP/s" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        calibrate.main([str(folder), str(folder)])
    assert "is a second device of kind cpu" in capsys.readouterr().err
    monkeypatch.setattr(calibrate, "CONSTANTS", {"cpu": {}, "cuda": {}})
    with pytest.raises(SystemExit):
        calibrate.main([str(folder)])
    assert "the constants of cuda would be lost" in capsys.readouterr().err


def test_committed_results_can_be_read():
    for device in table.devices():
        assert table.read_device(device)
        is_gpu = device.name.startswith("cuda")  # may be incomplete; its page says what is missing
        assert is_gpu or not table.incomplete(device)
    assert (ROOT / "bench" / "README.md").exists()


def test_the_readme_says_what_the_committed_files_say():
    assert readme.main(["--check"]) == 0
