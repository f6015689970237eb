"""Kernels for Cortex-M: int8 (portable, DSP, MVE) and float32.

Projects get the headers as they are. int8.h is long because a project has all of its int8 kernels in one file.
"""
