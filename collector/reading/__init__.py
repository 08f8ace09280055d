"""Parts that the readers of files share: opening files, a moving window over a file, options, the reader's protocol."""
