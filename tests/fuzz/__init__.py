"""`./dev fuzz`: feeds hostile and damaged input to every reader of foreign data, for as long as the user wants."""
