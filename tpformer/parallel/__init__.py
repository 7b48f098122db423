"""The parallelisms around the layers: data parallel."""
