"""A measurement under way: sources to sinks, on this machine and over a broker."""
