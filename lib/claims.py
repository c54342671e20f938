"""Print the claims and their verdicts: the command `python -m lib.claims`, see `lib.report.claims`."""

from lib.report.claims import main

if __name__ == "__main__":
    main()
