"""Data sets: image files are found, decoded once and split."""
