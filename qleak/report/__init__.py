"""What people read of a run: rendered from its files alone, so that any stored run can be rendered again."""
