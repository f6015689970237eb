"""Where a bundle runs: this machine, a board over RPC, an emulated board."""

from netship import targets as targets  # refuses a wrong Python first
