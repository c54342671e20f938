"""Distillation for adversarial defence: teachers, distillation and honest attacks behind the notebooks."""
