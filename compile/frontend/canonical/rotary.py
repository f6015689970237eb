"""The rule of RotaryEmbedding, whose definition by simpler operators has empty tensors."""

from __future__ import annotations

from typing import Any

import onnx

from netship.compile.frontend.canonical.graph import (
    Chain,
    Graph,
    attributes_of,
    refusal,
)


def rotary_embedding(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """Unknown to the importer: of each head pairs are turned by an angle, of which sine and cosine are given."""
    attributes, chain = attributes_of(node), Chain(node, graph)
    x, shape = node.input[0], graph.shape(node.input[0])
    batch, steps = shape[0], shape[-2]
    heads = shape[1] if len(shape) == 4 else attributes.get("num_heads", 0)
    if heads < 1:
        raise refusal(node, "of three dimensions it needs num_heads; export again")
    size = shape[-1] if len(shape) == 4 else shape[-1] // heads
    if len(shape) == 3:
        x = chain.add("Reshape", x, (batch, steps, heads, size))
        x = chain.add("Transpose", x, perm=[0, 2, 1, 3])
    turned = attributes.get("rotary_embedding_dim", 0) or size
    places = node.input[3] if len(node.input) > 3 else ""
    of_each = graph.shape(places) if places else graph.shape(node.input[1])[:-1]
    widths = {2 * graph.shape(name)[-1] for name in node.input[1:3]}
    if turned > size or widths != {turned} or of_each != (batch, steps):
        raise refusal(
            node,
            f"turns {turned} of {size} elements of a head at {steps} places, which its angles do not fit; export again",
        )
    half, interleaved = turned // 2, attributes.get("interleaved", 0)

    def part(start: int, end: int, step: int = 1) -> str:
        return chain.add("Slice", x, [start], [end], [3], [step])

    pair = [part(0, half), part(half, turned)]
    if interleaved:
        pair = [part(0, turned, 2), part(1, turned, 2)]
    angles = []
    for name in node.input[1:3]:
        if places:
            name = chain.add("Gather", name, places, axis=0)
        angles.append(chain.add("Reshape", name, (-1, 1, steps, half)))
    cosine, sine = angles

    def products(left: str, right: str) -> list[str]:
        return [
            chain.add("Mul", one, other)
            for one, other in zip(pair, (left, right), strict=True)
        ]

    real = chain.add("Sub", *products(cosine, sine))
    other = chain.add("Add", *products(sine, cosine))
    parts: list[Any] = [real, other]
    if interleaved:
        single = batch, heads, steps, half, 1
        apart = [chain.add("Reshape", each, single) for each in parts]
        both = chain.add("Concat", *apart, axis=4)
        parts = [chain.add("Reshape", both, (batch, heads, steps, turned))]
    if turned < size:
        parts.append(part(turned, size))
    whole = parts[0] if len(parts) == 1 else chain.add("Concat", *parts, axis=3)
    if len(shape) == 3:
        whole = chain.add("Transpose", whole, perm=[0, 2, 1, 3])
    return chain.end("Reshape", whole, shape)
