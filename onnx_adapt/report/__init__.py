"""What a person looks at: one HTML page about a base and its adapted model."""
