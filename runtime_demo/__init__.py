"""Command lines run, check and demo: accuracy, latency and the report of a bundle."""

import targets as targets  # refuses a wrong Python before newer syntax is parsed
