"""The commands of `python -m lib`: a defence and images by name, evaluated or checked."""
