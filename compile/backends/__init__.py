"""What a build can make: a bundle, a standalone library, a C project."""
