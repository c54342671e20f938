"""The report: claims, figures and tables, from the records alone."""
