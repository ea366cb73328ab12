"""What is measured and shown: latency against the dense model, pictures, tables."""
