"""Relay operators of our own."""
