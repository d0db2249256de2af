"""Other libraries beside u2a_fast: same model, same negatives; each has a process and an environment of its own."""
