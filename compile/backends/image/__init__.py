"""C that turns a camera's bytes into the input, and class numbers into names, for every format."""
