"""Files for other tools: the commands of the group, one file each."""
