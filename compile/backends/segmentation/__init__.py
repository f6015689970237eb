"""C that gives each pixel the class of its best score, for every format."""
