"""What tests and benches share: shapes, metrics, timing, random problems."""
