"""PostgreSQL: the connection pool, the queries of a request, and their coalescing."""
