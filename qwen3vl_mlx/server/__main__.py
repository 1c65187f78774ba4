"""`python -m qwen3vl_mlx.server`."""

import sys

from qwen3vl_mlx.server.command import main

if __name__ == "__main__":
    sys.exit(main())
