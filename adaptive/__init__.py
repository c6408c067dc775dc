"""Adaptive-computation control with statistical calibration."""
