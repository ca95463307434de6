"""The metric, thresholds and intervals: numbers in, numbers out."""
