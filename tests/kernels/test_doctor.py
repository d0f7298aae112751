"""The doctor names every path, and says so when one is wrong."""

import subprocess
import sys

import torch

from bstriplet_kernels import available_impls, doctor
from bstriplet_kernels.paths import PATHS


def test_the_command_reports_every_path():
    result = subprocess.run(
        [sys.executable, "-m", "bstriplet_kernels"], capture_output=True, text=True, check=True
    )
    assert f"torch {torch.__version__.split('+')[0]}" in result.stdout
    for name in PATHS:
        line = next(line for line in result.stdout.splitlines() if line.strip().startswith(name))
        assert ("agrees, relative error" in line) == (name in available_impls())
    assert "all paths that can run agree" in result.stdout


def test_a_wrong_path_and_a_missing_one_are_named(monkeypatch, capsys):
    right = PATHS["reference"]

    def wrong_gradient(*args):
        grad, grad_ref = right.backward(*args)
        return grad * 1.001, grad_ref

    monkeypatch.setitem(PATHS, "wrong", right._replace(backward=wrong_gradient))
    monkeypatch.setitem(PATHS, "absent", right._replace(missing=lambda: "there is no widget"))
    assert doctor.main() == 1
    out = capsys.readouterr().out
    assert "wrong      DISAGREES, relative error 1.0e-03" in out
    assert "absent     not here: there is no widget" in out
    assert "A PATH DISAGREES" in out
