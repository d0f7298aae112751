"""What surrounds the batch-similarity triplet loss: mining, sampling, data, training and reports.

Importing this package is cheap; its modules import torch, timm and scikit-learn when they are used.
"""
