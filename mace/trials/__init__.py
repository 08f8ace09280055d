"""Measures MACE itself: experiments, comparisons, verification."""
