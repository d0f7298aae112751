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
    "cpu": {  # AMD EPYC (AVX2), 2 cores, 2 threads, 501d7e43fb+
        "native": Constants(1.208e-04, 6.003e-12, 1.449e-10),
        "gram": Constants(4.994e-04, 1.146e-11, 4.012e-11),
        "reference": Constants(9.586e-04, 8.109e-12, 1.127e-10),
    },
}
