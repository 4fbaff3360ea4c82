"""What people and CI run: demo, test, check, and the servers they run on."""
