"""What people see: tables, pictures, timelines, text."""
