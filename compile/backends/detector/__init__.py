"""C that turns a network's outputs into boxes, for every format."""
