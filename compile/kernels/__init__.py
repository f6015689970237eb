"""Kernels in C, and how what they read is packed."""
