"""Tests of the formats floor: committed vectors, properties, and hostile bytes."""
