"""`./dev fuzz`: hostile and damaged input for everything that reads what others wrote, for as long as one likes."""
