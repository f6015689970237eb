"""The meter: estimated cycles of a network on a Cortex-A core."""

from netship import targets as targets  # refuses a wrong Python first
