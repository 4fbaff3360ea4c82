"""Publishing with confirms: the publisher, its connections, AMQP frames, outcomes."""
