"""Versions of the registered model, who is the champion, and why."""
