"""The only package that drives psycopg."""
