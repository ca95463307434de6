"""Tracked experiments for finding and outlining pneumothorax on chest radiographs."""

__version__ = "0.1.0"
