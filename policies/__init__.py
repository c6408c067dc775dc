"""Scores and stopping rules on torch tensors."""
