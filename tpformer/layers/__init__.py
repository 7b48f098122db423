"""The parallel layers."""
