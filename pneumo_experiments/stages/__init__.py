"""One file per entry point, named after it; only these hand results to tracking."""
