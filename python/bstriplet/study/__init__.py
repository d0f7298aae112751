"""Experiments of many runs: trained, read back, summarised and tested."""
