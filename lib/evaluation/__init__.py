"""Evaluation: robust accuracy, threat models, sanity checks, certificates."""
