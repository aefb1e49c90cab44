import sys

from depthpass.fuzz.command import main

if __name__ == "__main__":
    sys.exit(main())
