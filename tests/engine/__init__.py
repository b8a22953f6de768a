"""The floor where things happen: ingest, Nix's database; and the settings that all of it follows."""
