"""The parts of a rewrite: what a slot will be, the edit, damage done by others."""
