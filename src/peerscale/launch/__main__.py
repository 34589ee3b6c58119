"""`python -m peerscale.launch`."""

import sys

from peerscale.errors import exit_code
from peerscale.launch.run import main

if __name__ == "__main__":
    sys.exit(exit_code(main))
