"""Hugging Face's model types: a file each, with their config.json both ways and their names for our parameters."""
