"""Measured speed of each path by kind of device. Written by `python -m bench.calibrate`.

Seconds of forward and backward in float32 are call + flop * FLOPs + byte * bytes.
"""

from typing import NamedTuple


class Constants(NamedTuple):
    """Seconds a call, a FLOP and a byte."""

    call: float
    flop: float
    byte: float


CONSTANTS: dict[str, dict[str, Constants]] = {
    "cpu": {  # AMD EPYC, 2 cores, 2 threads, 7b60c87d40
        "reference": Constants(4.792e-04, 7.053e-12, 1.414e-10),
        "native": Constants(7.773e-05, 4.354e-12, 1.583e-10),
        "gram": Constants(1.555e-03, 9.594e-12, 2.094e-10),
    },
}
