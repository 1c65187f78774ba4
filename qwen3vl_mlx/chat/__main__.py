from __future__ import annotations

import sys

from qwen3vl_mlx.chat.command import main

if __name__ == "__main__":
    sys.exit(main())
