"""Statistics for adaptive computation: arrays in, certificates out (no torch)."""
