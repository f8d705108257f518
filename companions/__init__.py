"""What stands beside the method: each module imports infoard, which knows them by name only."""
