"""Judging: the metric, the thresholds, the submission and the pictures. Numpy, Pillow and Matplotlib."""
