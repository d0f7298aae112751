"""Measured speed of each path by kind of device. Written by `python -m bench.calibrate`.

Of forward and backward, eager, in float32 and, on a GPU, in half precision.
"""

from .cost import Constants

CONSTANTS: dict[str, dict[str, Constants]] = {
    "cpu": {  # AMD EPYC (AVX2), 2 cores, 2 threads, e34336ac49+
        "native": Constants(1.183e-04, 6.793e-12, 1.499e-10),
        "gram": Constants(5.164e-04, 1.130e-11, 7.614e-11),
        "reference": Constants(9.636e-04, 8.016e-12, 1.492e-10),
    },
}
