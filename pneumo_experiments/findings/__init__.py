"""Masks for a folder of radiographs: findings, submission and its check."""
