"""A model on labelled images: counts, thresholds, scores and their report."""
