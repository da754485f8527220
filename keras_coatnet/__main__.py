"""`python -m keras_coatnet`: the command line."""

from __future__ import annotations

import sys

from keras_coatnet.cli import main

if __name__ == "__main__":
    sys.exit(main())
