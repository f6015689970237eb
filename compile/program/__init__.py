"""A compiled network as kernel calls and tensors with lifetimes; where each tensor lies."""
