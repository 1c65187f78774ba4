"""An HTTP server for the clients of OpenAI and Anthropic: `python -m qwen3vl_mlx.server`."""
