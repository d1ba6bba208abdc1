"""The measurements, one question per program: ``python -m benchmarks.NAME``. Nothing imports them."""
