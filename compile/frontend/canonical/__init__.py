"""ONNX forms that TVM 0.19's Relay importer gets wrong, rewritten into forms it gets right."""
