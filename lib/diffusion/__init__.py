"""Diffusion models: noise schedule, network, solvers."""
