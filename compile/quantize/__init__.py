"""Float32 into int8: calibration, and what it costs in accuracy."""
