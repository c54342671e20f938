"""Distillation for adversarial defence."""
