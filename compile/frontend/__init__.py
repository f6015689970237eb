"""From a file that nobody vouches for to one clean, static ONNX graph, and its preprocessing."""
