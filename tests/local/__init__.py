"""The floor that keeps this machine's disk: state folder, index, packs, journal, publishing, rebuild."""
