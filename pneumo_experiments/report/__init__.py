"""The data report that preprocess leaves: what was used, what was rejected, what is odd."""
