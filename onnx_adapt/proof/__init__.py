"""The parts of a verification: inputs, taps, probes, comparisons."""
