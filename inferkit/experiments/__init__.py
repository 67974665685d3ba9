"""Experiments: recorded as they happen, kept in one file, run again and compared."""
