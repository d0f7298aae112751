"""Pages and figures from runs on disk."""
