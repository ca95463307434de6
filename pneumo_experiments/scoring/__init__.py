"""Judging: the metric, the thresholds, the submission and the pictures. Numpy and Pillow only."""
