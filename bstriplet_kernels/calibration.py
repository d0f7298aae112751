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
    "cuda": {  # NVIDIA H200, 16 threads, d25713bac9
        "triton small": Constants(2.816e-04, 1.871e-12, 0.000e00),
        "native": Constants(1.509e-04, 2.224e-12, 0.000e00),
        "gram": Constants(2.361e-03, 0.000e00, 4.437e-13, launch=2.495e-05, half=8.269e-14),
        "reference": Constants(2.450e-03, 0.000e00, 7.516e-13, half=0.000e00),
        "triton tiles": Constants(1.024e-03, 2.282e-15, 0.000e00, half=2.659e-15),
        "triton panels": Constants(
            7.586e-04, 1.710e-15, 0.000e00, launch=6.212e-05, half=1.650e-15
        ),
        "gram triton": Constants(1.663e-03, 1.558e-15, 0.000e00),
    },
}
