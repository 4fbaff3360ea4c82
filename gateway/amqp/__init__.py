"""Confirmed publishing: frames and confirms are pure, the publisher holds the connections."""
