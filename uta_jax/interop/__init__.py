"""Weights in and out: the one place where other libraries' names and layouts are known."""
