"""Visual token compression: one file a method, and the protocol that they share."""
