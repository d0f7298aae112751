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
    "cuda": {  # NVIDIA H200, 16 threads, 9978cca5f2
        "triton small": Constants(2.880e-04, 1.500e-12, 1.119e-11),
        "native": Constants(1.525e-04, 0.000e00, 1.096e-11),
        "gram": Constants(5.754e-03, 3.760e-14, 0.000e00, launch=1.284e-05, half=0.000e00),
        "reference": Constants(2.395e-03, 9.258e-15, 8.008e-14, half=3.597e-14),
        "triton tiles": Constants(8.423e-04, 2.212e-15, 0.000e00, half=3.076e-15),
        "triton panels": Constants(
            7.152e-04, 1.726e-15, 0.000e00, launch=4.223e-05, half=3.034e-15
        ),
        "gram triton": Constants(1.633e-03, 1.807e-15, 0.000e00),
    },
}
