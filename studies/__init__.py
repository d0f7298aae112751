"""Studies that train networks or count backbones; `bench` measures the loss alone."""
