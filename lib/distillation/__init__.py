"""Distillation: what a student learns, one file per method."""
