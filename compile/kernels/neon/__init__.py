"""int8 for 64-bit ARM: operators in C with NEON intrinsics, called from Relay, channels last."""
