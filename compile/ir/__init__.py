"""The operator graph that every backend is built from, and the numbers that each operator must give."""
