"""Networks as plain C for microcontrollers: graph → fused steps → memory plan → files."""
