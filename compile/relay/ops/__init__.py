"""Relay operators of our own. Only the engine's process imports them."""
