"""A network as one C library: header, code that a person can read, weights, nothing of TVM."""
