"""Scores of a model on a benchmark, their files and their pages."""
