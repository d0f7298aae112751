"""Pages and figures from what runs have left on disk."""
