"""Where a bundle runs: this machine, a board over RPC, an emulated board."""

import targets as targets  # refuses a wrong Python before newer syntax is parsed
