"""A bundle loaded on one device or several, and run."""
