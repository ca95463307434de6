"""Synthetic radiographs with pneumothorax, in the layout of the SIIM-ACR data."""
