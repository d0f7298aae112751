"""From a configuration and images to a run folder with a trained network and its results."""
