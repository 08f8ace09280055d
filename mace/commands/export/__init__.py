"""What others can look at: the commands of the group, one file each."""
