"""Output for people: tables, pictures, timelines, lines of text."""
