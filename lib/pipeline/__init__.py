"""The pipeline: notebooks run with checked parameters, profiles, benchmark, audit, environment."""
