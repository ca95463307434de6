"""The metric, thresholds, scores, the submission file and figures, on NumPy, Pillow and Matplotlib."""
