"""How a board is reached: ssh, TVM RPC servers and trackers."""
