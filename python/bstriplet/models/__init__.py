"""Networks: importing this package registers ``shufflenet_v2`` and ``peleenet`` with timm."""

from bstriplet.models import peleenet, shufflenet  # noqa: F401  (their decorators register them)
