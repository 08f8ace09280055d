"""What readers of files share: how a file is opened, which part of it is mapped, which options there are."""
