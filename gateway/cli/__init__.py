"""The command line: `serve`, `migrate`, `status`, and the administration of accounts, keys and lists."""
