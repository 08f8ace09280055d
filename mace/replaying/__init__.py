"""Recordings replayed: part by part, resumed, on a cluster."""
