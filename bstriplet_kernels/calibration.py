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
        "native": Constants(1.183e-04, 6.551e-12, 1.508e-10),
        "gram": Constants(5.190e-04, 1.114e-11, 6.804e-11),
        "reference": Constants(9.561e-04, 7.465e-12, 1.492e-10),
    },
}
