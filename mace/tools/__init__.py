"""Runs measurement tools or reads their output, and corrects their round trips."""
