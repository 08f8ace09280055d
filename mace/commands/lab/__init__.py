"""Test networks: the commands of the group, one file each."""
