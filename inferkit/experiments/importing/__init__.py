"""Readers of the files of other benchmarks, a module for each tool."""
