"""The meter: estimated cycles of a network on a Cortex-A core."""

import targets as targets  # refuses a wrong Python before newer syntax is parsed
