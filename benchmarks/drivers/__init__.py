"""Everything that runs while something is measured: load, systems under test, servers, and their accounting."""
