"""Bare boards under QEMU: start-up code, linker script, exact instruction counts."""
