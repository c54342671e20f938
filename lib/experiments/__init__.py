"""The experiments: one module per notebook, with what it needs beside it."""
