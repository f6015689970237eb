"""Our bundles compared with other runtimes by the same meter, and the meter with published times."""

from netship import targets as targets  # refuses a wrong Python first
