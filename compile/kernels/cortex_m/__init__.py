"""Kernels for Cortex-M: int8 (portable, DSP, MVE) and float32."""
