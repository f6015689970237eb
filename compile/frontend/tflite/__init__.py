"""A .tflite model as ONNX: reader.py reads the file, convert.py makes the graph, one file for each family of operators."""
