"""Quantisation: number formats, rounding, calibration and training."""
