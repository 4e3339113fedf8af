"""A live session on a full screen, recorded and replayed."""
