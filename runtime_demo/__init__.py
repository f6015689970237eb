"""Command lines run, check and demo: accuracy, latency and the report of a bundle."""

from netship import targets as targets  # refuses a wrong Python first
