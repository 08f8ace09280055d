"""Pairs of packet captures: the inner and the outer device."""
