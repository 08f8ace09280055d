"""Live measurements, from sources to sinks, on this machine and through a broker."""
