"""Benchmarks: how long tpformer takes, beside the peers a reader would otherwise use."""
