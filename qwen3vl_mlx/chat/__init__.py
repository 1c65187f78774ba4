"""A conversation in the terminal: `python -m qwen3vl_mlx.chat`."""
