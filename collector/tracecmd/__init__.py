"""trace.dat files of trace-cmd, versions 6 and 7."""
