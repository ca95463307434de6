"""What the entry points share: subsets, the train-and-validate loop, out-of-fold scores, reports."""
