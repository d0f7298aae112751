"""One module for each way of computing the loss, and their names."""

from __future__ import annotations

from .. import reference
from ..spec import Path
from . import moments, native, triton

PATHS: dict[str, Path] = {
    "reference": reference.PATH,
    "triton": triton.PATH,
    "native": native.PATH,
    "gram": moments.PATH,
}
"""The paths by the name that `impl` takes, whether or not they can run here."""
