"""Weights: which exist, how they are fetched, and a reader for each layout."""
