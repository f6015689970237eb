"""Rewrites of the operator graph, from what the model says to what a backend runs."""
