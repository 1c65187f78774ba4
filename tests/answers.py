"""What models answer, as they write it."""

from __future__ import annotations

# Qwen3-VL to "Locate every instance that belongs to the following categories": 0 to 1000.
GOLDEN = """```json
[
\t{"bbox_2d": [100, 200, 300, 400], "label": "cat"},
\t{"bbox_2d": [500, 500, 600, 600], "label": "dog"}
]
```"""
