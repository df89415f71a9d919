"""Utilities for all packages; imports nothing of the project."""
