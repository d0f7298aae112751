"""Images as people have them: found, decoded once, split."""
