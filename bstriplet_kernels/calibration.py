"""Measured speed of each path by kind of device. Written by `python -m bench.calibrate`.

Of forward and backward, eager, in float32 and, on a GPU, in half precision.
"""

from .cost import Constants

CONSTANTS: dict[str, dict[str, Constants]] = {
    "cpu": {  # AMD EPYC (AVX2), 2 cores, 2 threads, e34336ac49+
        "native": Constants(1.183e-04, 6.551e-12, 1.508e-10),
        "gram": Constants(5.190e-04, 1.114e-11, 6.804e-11),
        "reference": Constants(9.561e-04, 7.465e-12, 1.492e-10),
    },
}
