"""Training: one fold, all folds, and going on after an interruption."""
