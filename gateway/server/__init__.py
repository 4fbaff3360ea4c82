"""The process: listen, handle signals, drain; and the supervisor of several worker processes."""
