"""The network and its training: torch and torchvision live here."""
