"""The pages of the app, and the rooms that they share; docs/architecture.md has the map."""
