"""Our bundles compared with other runtimes by the same meter, and the meter with published times."""

import targets as targets  # refuses a wrong Python before newer syntax is parsed
