"""The repository's root, whatever the working directory is."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
