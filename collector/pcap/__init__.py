"""Pairs of packet captures, one at the inner and one at the outer device."""
