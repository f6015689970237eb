"""Tuning records for AutoScheduler, and which of a network's tasks they cover."""

import targets as targets  # refuses a wrong Python before newer syntax is parsed
