"""The programs for boards, the state that they report, and the kit that brings them to a board."""
