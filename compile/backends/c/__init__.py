"""int8 networks as plain C for microcontrollers: graph → fused steps → memory plan → files."""
