"""One module for each way of computing the loss; here, their names."""

from __future__ import annotations

from ..spec import Path
from . import moments, native, plain, triton

PATHS: dict[str, Path] = {
    "reference": plain.PATH,
    "triton": triton.PATH,
    "native": native.PATH,
    "gram": moments.PATH,
}
"""The paths by the name that `impl` takes, whether or not they can run here."""
