"""Doors to other tools; each is imported on its own and needs its extra."""
