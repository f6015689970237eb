"""Our bundles compared with other runtimes by the same meter, and the meter with published times."""
