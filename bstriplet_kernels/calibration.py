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
    "cpu": {  # AMD EPYC (AVX2), 2 cores, 2 threads, 0b0ba085c0
        "reference": Constants(1.170e-03, 9.775e-12, 1.118e-10),
        "native": Constants(1.526e-04, 6.324e-12, 1.839e-10),
        "gram": Constants(6.389e-04, 1.122e-11, 1.013e-11),
    },
}
