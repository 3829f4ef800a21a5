"""The ground floor, which every package may import: files written whole, text for people. No heavy library."""
