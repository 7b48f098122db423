"""Saving and loading: one name space of safetensors, independent of the layout that wrote it."""
