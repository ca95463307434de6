"""One file per entry point, named after it: opens the run, calls the rooms below, prints the result."""
