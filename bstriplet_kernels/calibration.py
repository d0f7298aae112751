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
    "cpu": {  # AMD EPYC (AVX2), 2 cores, 2 threads, e34336ac49+
        "native": Constants(1.183e-04, 6.861e-12, 1.419e-10),
        "gram": Constants(5.166e-04, 1.135e-11, 7.676e-11),
        "reference": Constants(9.555e-04, 8.099e-12, 1.464e-10),
    },
}
