"""Files that go in and out: clips, strips, a run's folder."""
