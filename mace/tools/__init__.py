"""Measurement tools, run or read, and their round trips corrected."""
