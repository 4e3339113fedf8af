"""Live sessions on a full screen, and recordings of them."""
