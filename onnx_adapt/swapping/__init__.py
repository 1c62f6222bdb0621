"""The parts of a session: adapters loaded, blended, mixed, bound and run."""
