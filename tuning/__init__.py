"""Tuning records for AutoScheduler, and which of a network's tasks they cover."""

from netship import targets as targets  # refuses a wrong Python first
