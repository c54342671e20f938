"""Write params.yaml for a profile: the command `python -m lib.profile`, see `lib.pipeline.profile`."""

from lib.pipeline.profile import main

if __name__ == "__main__":
    main()
