"""From an ONNX file to a checked bundle: gate, import, lower, build, emit."""

import targets as targets  # refuses a wrong Python before newer syntax is parsed
