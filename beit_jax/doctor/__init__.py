"""Checks a machine before a long run."""
