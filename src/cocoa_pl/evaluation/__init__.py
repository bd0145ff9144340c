"""Evaluation: an `encode` callable and subsets -> scores -> results.json, report, summaries."""
