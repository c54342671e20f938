"""How results are produced: what DVC and the Makefile call.

notebook     runs one notebook with checked parameters (`python -m lib.run`)
code         hashes of the code that the pipeline runs
parameters   reads and checks a notebook's parameters
profile      composes params.yaml from profiles/ (`python -m lib.profile`)
benchmark    measures latencies and costs (`make bench`)
audit        runs evaluations that take longer than `dvc repro` may
environment  checks and completes the environment
"""
