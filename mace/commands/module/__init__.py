"""The kernel module: the commands of the group, one file each."""
