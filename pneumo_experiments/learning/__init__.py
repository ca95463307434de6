"""Networks, losses, data loading, training, inference and threshold counts, on torch and torchvision."""
