"""The experiments: one module per notebook."""
