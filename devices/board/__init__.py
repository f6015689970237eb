"""A board's own programs, what they say of it, and the kit that carries them there."""
