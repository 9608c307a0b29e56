"""Private PostgreSQL and Redis for development, the demo and tests; they end with the program that started them."""
