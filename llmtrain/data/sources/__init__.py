"""Raw inputs: files, documents and records."""
