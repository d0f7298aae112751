"""Many runs: planned, read back, summarised, tested."""
