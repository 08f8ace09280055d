"""Measurements of MACE itself: experiments, comparisons, verification."""
