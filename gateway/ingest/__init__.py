"""One batch from bytes to answer: admission, authentication, decoding, validation, message ids, idempotency."""
