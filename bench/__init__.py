"""Other runtimes beside us under the same meter, and the meter against published times."""
