"""Where a bundle runs: this machine, a board over RPC, an emulated board."""
