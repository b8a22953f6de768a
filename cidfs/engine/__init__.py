"""What happens: ingest, export, verification. trio around the synchronous floors below."""
