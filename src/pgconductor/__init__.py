"""Durable execution on nothing but PostgreSQL, native to Trio."""
