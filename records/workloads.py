"""What AutoScheduler's workload keys say of their tasks, for people."""

from __future__ import annotations

import json
from itertools import pairwise


def shapes(key: str) -> list[tuple[int, ...]]:
    """The shapes of a task's tensors, the output's last."""
    return [tuple(shape) for shape in json.loads(key)[1:] if isinstance(shape, list)]


def operator_of(key: str) -> str:
    """What a task computes, for people, from its tensors' shapes."""
    *inputs, output = shapes(key)
    where = "×".join(map(str, output[1:-1] if len(output) > 2 else output))
    for image, weight in pairwise(inputs):
        if not len(image) == len(weight) == 4 or image[3] != weight[2]:
            continue
        filters = f"{weight[0]}×{weight[1]}"
        if weight[3] == 1 and output[3] == image[3] > 1:
            return f"depthwise {filters}, {image[3]}, {where}"
        if weight[3] == output[3]:
            residual = " + residual" if inputs.index(image) else ""
            return f"conv {filters}, {image[3]}→{weight[3]}, {where}{residual}"
    return f"other, {where}"
