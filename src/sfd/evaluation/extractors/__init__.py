"""Extractors: networks through whose features images are compared. Each module here is one, found by its file name."""
