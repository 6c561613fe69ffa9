"""Visual token compression: one file a method, baselines included, and their common protocol."""
