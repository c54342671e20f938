"""Conclusions computed from records: sentences whose words follow from the numbers, one module per experiment."""
