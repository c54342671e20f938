"""Run one notebook with checked parameters: the command `python -m lib.run`, see `lib.pipeline.notebook`."""

from lib.pipeline.notebook import main

if __name__ == "__main__":
    main()
