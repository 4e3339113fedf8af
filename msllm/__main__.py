"""`python -m msllm COMMAND` runs the command `msllm COMMAND`."""

import sys

from msllm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
