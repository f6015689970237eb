"""The bundle: what a build leaves behind and a device checks. Knows nothing of TVM."""
