"""`python -m peerscale.train`."""

import sys

from peerscale.errors import exit_code
from peerscale.train.run import main

if __name__ == "__main__":
    sys.exit(exit_code(main))
