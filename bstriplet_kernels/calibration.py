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
    "cpu": {  # AMD EPYC (AVX2), 2 cores, 2 threads, 4a0c74d176
        "native": Constants(1.166e-04, 6.039e-12, 1.805e-10),
        "gram": Constants(4.836e-04, 1.065e-11, 4.091e-11),
        "reference": Constants(9.097e-04, 8.311e-12, 1.212e-10),
    },
}
