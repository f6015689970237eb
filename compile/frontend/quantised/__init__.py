"""Quantised models in the one form that the compiler knows."""
