"""Doors to other tools; each is imported on its own and needs its extra."""

__all__: list[str] = []
