"""From an ONNX file to a checked bundle: gate, import, lower, build, emit."""

from netship import targets as targets  # refuses a wrong Python first
