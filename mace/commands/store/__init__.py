"""The store's files: the commands of the group, one file each."""
