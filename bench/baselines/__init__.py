"""Other runtimes for aarch64: their wheels, their models made of ONNX, their runs in an emulated system."""
